"""Sites mean what they say, in every family: checked against the arithmetic of the residual stream."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gsae.harvest import LanguageModel, capture, resolve
from gsae.store import UsageError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # heads concatenated are 48 wide, not 32
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Family -> the module whose input is the residual stream between attention and MLP.
FAMILIES = {
    "Llama": "post_attention_layernorm",
    "Mistral": "post_attention_layernorm",
    "Qwen2": "post_attention_layernorm",
    "Qwen3": "post_attention_layernorm",
    "Gemma": "post_attention_layernorm",
    "Gemma2": "pre_feedforward_layernorm",
    "Gemma3": "pre_feedforward_layernorm",
    "Olmo2": "mlp",
}


def built(family: str, device: str = "cpu") -> Any:
    import transformers

    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(config(**SIZES)).eval()


def watched(model: Any, paths: list[str], tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each module's first input and output in a whole pass, by hooks of this test's own."""
    seen = {}
    for path in paths:

        def keep(module: Any, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            first = args[0] if args else next(iter(kwargs.values()))
            seen[path] = (first, output[0] if isinstance(output, tuple) else output)

        model.get_submodule(path).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=tokens)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_add_up_to_the_residual_stream(family: str) -> None:
    model = built(family)
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    sites = resolve(model, ["resid.0", "attn.1", "mlp.1", "resid.1", "resid.2", "mlp.-1"])
    found = capture(LanguageModel(model, None, None), sites, tokens)  # type: ignore[arg-type]
    for site in sites:
        assert found[site.name].shape == (2, 9, site.d_in)

    layer = "model.layers.1"
    between, projection = f"{layer}.{FAMILIES[family]}", f"{layer}.self_attn.o_proj"
    seen = watched(model, [layer, "model.layers.2", "model.norm", between, projection], tokens)
    assert torch.equal(found["resid.0"], seen[layer][0])
    assert torch.equal(found["resid.1"], seen[layer][1])
    assert torch.equal(found["resid.2"], seen["model.norm"][0])
    assert not torch.equal(found["resid.2"], seen["model.norm"][1])
    torch.testing.assert_close(found["mlp.1"], found["resid.1"] - seen[between][0], rtol=1e-4, atol=1e-4)
    assert found["attn.1"].shape[-1] == 48
    output = torch.nn.functional.linear(found["attn.1"], model.model.layers[1].self_attn.o_proj.weight.detach())
    torch.testing.assert_close(output, seen[projection][1])


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Gemma3"])
def test_sites_are_the_same_without_weights(family: str) -> None:
    names = ["resid.2", "mlp.0", "attn.1", "module:model.layers.1.mlp.act_fn:out", "module:lm_head:in"]
    without = resolve(built(family, "meta"), names)
    assert without == resolve(built(family), names)
    assert [site.d_in for site in without] == [32, 32, 48, 48, 32]


def test_a_site_knows_its_folder_and_its_name_in_transformer_lens() -> None:
    sites = resolve(built("Llama", "meta"), ["resid.-1", "mlp.1", "attn.0", "module:model.norm:out"])
    assert [(s.name, s.folder, s.module, s.hook, s.hook_name) for s in sites] == [
        ("resid.2", "resid.2", "model.layers.2", "out", "blocks.2.hook_resid_post"),
        ("mlp.1", "mlp.1", "model.layers.1.mlp", "out", "blocks.1.hook_mlp_out"),
        ("attn.0", "attn.0", "model.layers.0.self_attn.o_proj", "in", "blocks.0.attn.hook_z"),
        ("module:model.norm:out", "module.model.norm.out", "model.norm", "out", "model.norm"),
    ]


def test_what_a_branch_adds_is_taken_after_its_norm() -> None:
    for family, module in [("Gemma2", "post_feedforward_layernorm"), ("Olmo2", "post_feedforward_layernorm")]:
        assert resolve(built(family, "meta"), ["mlp.0"])[0].module == f"model.layers.0.{module}"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["mlp.3"], r"^Site 'mlp\.3': this model has layers 0 to 2\.$"),
        (["resid.-4"], r"^Site 'resid\.-4': this model has layers 0 to 2\.$"),
        (["neuron.1"], r"'neuron\.1' is not a site\. A site is resid\.L, mlp\.L, attn\.L or module:PATH:in\|out"),
        (["mlp"], r"'mlp' is not a site"),
        (["mlp.1.2"], r"'mlp\.1\.2' is not a site"),
        (["module:model.norm"], r"'module:model\.norm' is not a site"),
        (["module:model.layers.1.mpl:out"], r"no module 'model\.layers\.1\.mpl'\. Nearest: model\.layers\.1\.mlp, "),
        (["module:model.rotary_emb:out"], r"gives \(1, 3, 12\); one vector a token"),
        (["module:model.layers:out"], r"the module is never reached"),
        (["mlp.2", "resid.1", "mlp.-1"], r"^Site 'mlp\.2' is named twice\.$"),
    ],
)
def test_a_name_that_is_no_site_of_the_model_is_told_in_one_line(names: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        resolve(built("Llama", "meta"), names)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_build_is_reached_by_module_path() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(UsageError, match=r"no decoder layers were recognised in GPT2LMHeadModel"):
        resolve(model, ["mlp.1"])
    (site,) = resolve(model, ["module:transformer.h.1.mlp:out"])
    assert site.d_in == 32
