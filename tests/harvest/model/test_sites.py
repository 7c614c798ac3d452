"""Sites hold what their names say in every family, checked by the arithmetic of the residual stream."""

from typing import Any

import pytest
import torch

from gsae.errors import UsageError
from gsae.harvest import LanguageModel, capture, offered, resolve, split_names
from gsae.tests.support.families import FAMILIES, built
from gsae.tests.support.recorded_pass import recorded
from gsae.tests.support.selection import mostly_slow


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "Llama", "GPT2", "Gemma2", "Mixtral"))
def test_sites_add_up_to_the_residual_stream(family: str) -> None:
    own, model = FAMILIES[family], built(family)
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    sites = resolve(model, ["resid.all", "attn.all", "mlp.all"])
    assert [site.name for site in sites] == [
        f"{kind}.{layer}" for kind in ("resid", "attn", "mlp") for layer in range(3)
    ]
    found = capture(LanguageModel(model, None, None), sites, tokens)  # type: ignore[arg-type]
    for site in sites:
        assert found[site.name].shape == (2, 9, site.d_in)

    seen = recorded(model, tokens)
    for number in range(3):
        layer, after = f"{own.layers}.{number}", f"{own.layers}.{number + 1}" if number < 2 else own.final
        attention, projection = f"{layer}.{own.attention}", f"{layer}.{own.attention}.{own.projection}"
        assert torch.equal(found[f"resid.{number}"], seen[layer][1])
        assert torch.equal(found[f"resid.{number}"], seen[after][0])
        between = seen[f"{layer}.{own.between}"][0] if own.between else seen[layer][0] + seen[attention][1]
        added = found[f"resid.{number}"] - between.reshape(2, 9, -1)
        torch.testing.assert_close(found[f"mlp.{number}"], added, rtol=1e-4, atol=1e-4)
        assert found[f"mlp.{number}"].abs().max() > 1e-3
        assert torch.equal(found[f"attn.{number}"], seen[projection][0])
        torch.testing.assert_close(model.get_submodule(projection)(found[f"attn.{number}"]), seen[projection][1])


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "Llama", "GPT2", "Gemma2", "Mixtral"))
def test_sites_are_the_same_without_weights(family: str) -> None:
    assert tuple(offered(built(family, "meta"))) == tuple(offered(built(family)))


@pytest.mark.parametrize("family", mostly_slow(["Llama", "Qwen2", "Gemma2", "Gemma3"], "Llama"))
def test_modules_are_the_same_without_weights(family: str) -> None:
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


def test_an_mlp_site_is_captured_after_the_norm_of_its_branch() -> None:
    for family, module in [("Gemma2", "post_feedforward_layernorm"), ("Olmo2", "post_feedforward_layernorm")]:
        assert resolve(built(family, "meta"), ["mlp.0"])[0].module == f"model.layers.0.{module}"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["mlp.3"], r"^Site 'mlp\.3': this model has layers 0 to 2\.$"),
        (["resid.-4"], r"^Site 'resid\.-4': this model has layers 0 to 2\.$"),
        (["neuron.1"], r"'neuron\.1' is not a site\. A site is resid\.L, mlp\.L, attn\.L, .* or module:PATH:in\|out"),
        (["mlp"], r"'mlp' is not a site"),
        (["mlp.1.2"], r"'mlp\.1\.2' is not a site"),
        (["module:model.norm"], r"'module:model\.norm' is not a site"),
        (["module:model.layers.1.mpl:out"], r"no module 'model\.layers\.1\.mpl'\. Nearest: model\.layers\.1\.mlp, "),
        (["module:model.rotary_emb:out"], r"gives \(1, 3, 12\)\. A site needs one vector for each token"),
        (["module:model.layers:out"], r"the module is never reached"),
        (["mlp.2", "resid.1", "mlp.-1"], r"^Site 'mlp\.2' is named twice\.$"),
    ],
)
def test_a_name_that_is_no_site_of_the_model_is_refused_in_one_line(names: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        resolve(built("Llama", "meta"), names)
    assert "\n" not in str(caught.value)


def test_layers_that_only_mix_have_no_mlp_and_their_modules_are_reached_by_path() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(UsageError, match=r"^Site 'mlp\.1': in layer 1, everything that the layer adds mixes tokens"):
        resolve(model, ["mlp.1"])
    (site,) = resolve(model, ["module:backbone.layers.1.mixer:out"])
    assert site.d_in == 32


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (["resid.-1"], ["resid.2"]),
        (["mlp.0-1", "attn.1-2"], ["mlp.0", "mlp.1", "attn.1", "attn.2"]),
        (["resid.-2--1"], ["resid.1", "resid.2"]),
        (["resid.1--1"], ["resid.1", "resid.2"]),
        (["mlp.all"], ["mlp.0", "mlp.1", "mlp.2"]),
    ],
)
def test_layers_may_be_ranges_and_count_from_the_end(asked: list[str], names: list[str]) -> None:
    assert [site.name for site in resolve(built("Llama", "meta"), asked)] == names


def test_a_comma_list_may_leave_out_the_kind() -> None:
    assert split_names("mlp.0,4,8-10, -2--1,attn.3,resid.all") == [
        *("mlp.0", "mlp.4", "mlp.8-10", "mlp.-2--1", "attn.3", "resid.all")
    ]
    assert split_names("module:lm_head:in,3") == ["module:lm_head:in", "3"]


@pytest.mark.parametrize(
    ("config", "settings", "layers", "widths"),
    [
        ("Gemma", {"hidden_size": 3072, "num_attention_heads": 16, "head_dim": 256}, 28, (3072, 4096)),
        pytest.param("Llama", {}, 32, (4096, 4096), marks=pytest.mark.slow),
        pytest.param("Mistral", {}, 32, (4096, 4096), marks=pytest.mark.slow),
        pytest.param(
            "GPTNeoX",
            {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 16384, "num_hidden_layers": 32},
            32,
            (4096, 4096),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gemma-7b", "llama-2-7b", "mistral-7b", "pythia-6.9b"],
)
def test_7b_models_have_the_right_widths(
    config: str, settings: dict[str, Any], layers: int, widths: tuple[int, int]
) -> None:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, f"{config}ForCausalLM")(getattr(transformers, f"{config}Config")(**settings))
    sites = {site.name: site.d_in for site in offered(model)}
    assert {f"{kind}.{number}" for kind in ("resid", "mlp", "attn") for number in range(layers)} <= set(sites)
    assert {sites[f"resid.{n}"] for n in range(layers)} == {sites[f"mlp.{n}"] for n in range(layers)} == {widths[0]}
    assert {sites[f"attn.{n}"] for n in range(layers)} == {widths[1]}


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("blocks.1.hook_mlp_out", "mlp.1"),
        ("model.layers.2", "resid.2"),
        ("transformer.h.1.mlp", "mlp.1"),
        ("attn_1", "attn.1"),
        ("residual.2", "resid.2"),
    ],
)
def test_a_name_of_another_library_is_answered_with_the_nearest_site(foreign: str, ours: str) -> None:
    with pytest.raises(UsageError, match=rf"is not a site.* Nearest: .*\b{ours}\b"):
        resolve(built("Llama", "meta"), [foreign])
