"""A wrong site is always caught: on the random instance by the search, on the loaded model by the tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gsae.errors import UsageError
from gsae.harvest import HarvestConfig, LanguageModel, capture, effects, harvest, load_lm, resolve
from gsae.harvest.model.confirm import confirm
from gsae.harvest.model.layer_parts import Mixer, Parts
from gsae.harvest.model.sites import resolve_with_parts
from gsae.store import open_store
from gsae.tests.support.causal_lms import tiny_model
from gsae.tests.support.families import built
from gsae.tests.support.selection import mostly_slow

NAMES = ["resid.1", "mlp.1", "attn.1", "mixer.1", "resid_mid.1", "mlp_in.1", "attn_in.1", "embed"]


def settings(model: Path, *sites: str) -> HarvestConfig:
    return HarvestConfig(
        model=str(model), dataset="builtin:pydoc", sites=sites, rows=200, context_size=32, max_documents=4, heldout=0.0
    )


def right(model: Any) -> tuple[Any, Parts]:
    sites, parts = resolve_with_parts(model, NAMES)
    return {site.name: site for site in sites}, parts[1]


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "the mixer as the MLP": ("mlp", {"mlp": ("self_attn",)}),
    "the norm before the MLP as the MLP": ("mlp", {"mlp": ("post_attention_layernorm",)}),
    "a projection into the MLP as the MLP": ("mlp", {"mlp": ("mlp.up_proj",)}),
    "a layer without its mixer": ("mlp", {"mixers": ()}),
    "the queries as the heads": ("attn", {"mixers": (Mixer("self_attn", "self_attn.q_proj"),)}),
    "a projection of the MLP as the heads": ("attn", {"mixers": (Mixer("self_attn", "mlp.down_proj"),)}),
    "the stream before the mixer as between": ("resid_mid", {"middle": "input_layernorm"}),
    "the stream as the MLP's input": ("mlp_in", {"mlp_in": "post_attention_layernorm"}),
    "the attention's input as the MLP's": ("mlp_in", {"mlp_in": "self_attn"}),
    "the MLP's input as the attention's": ("attn_in", {"mixer_in": "mlp"}),
}


@pytest.mark.parametrize("dtype", mostly_slow([torch.float32, torch.bfloat16, torch.float16], torch.bfloat16))
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_parts_are_caught_on_the_loaded_model(wrong: str, dtype: torch.dtype) -> None:
    model = built("Llama", hidden_size=64, intermediate_size=96).to(dtype)
    sites, parts = right(model)
    kind, changed = WRONG[wrong]
    confirm(model, [sites[f"{kind}.1"]], {1: parts})
    with pytest.raises(UsageError, match=rf"^Site '{kind}\.1' is not confirmed on the loaded model: ") as caught:
        confirm(model, [sites[f"{kind}.1"]], {1: replace(parts, **changed)})
    assert "\n" not in str(caught.value)


class Gated(nn.Module):
    """An MLP whose output is multiplied by something that the name of the module does not show."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        return self.layer(hidden_states, **others) * hidden_states.tanh()  # type: ignore[no-any-return]


class Added(Gated):
    """A layer that adds something beside its MLP and its attention."""

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        return self.layer(hidden_states, **others) + hidden_states.square()  # type: ignore[no-any-return]


@pytest.mark.parametrize("patch", [Gated, Added])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patched_layer_is_caught_by_the_search_and_by_the_test(patch: type[Gated], dtype: torch.dtype) -> None:
    model = built("Llama").to(dtype)
    sites, parts = right(model)
    model.model.layers[1] = patch(model.model.layers[1])
    with pytest.raises(UsageError, match=r"^Site 'mlp\.1': in layer 1, .* the layer's output is not its input"):
        resolve(model, ["mlp.1"])
    moved = replace(
        parts,
        mlp=tuple(f"layer.{path}" for path in parts.mlp),
        mixers=tuple(Mixer(f"layer.{m.adds}", f"layer.{m.projection}") for m in parts.mixers),
    )
    with pytest.raises(UsageError, match="not confirmed"):
        confirm(model, [sites["mlp.1"]], {1: moved})
    assert resolve(model, ["resid.1"]), "the stream is there all the same"


def test_a_model_of_another_structure_than_its_config_is_refused_before_the_plan(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def patched(config: HarvestConfig) -> LanguageModel:
        lm = load_lm(str(tiny_llama))
        lm.model.model.layers[1].mlp = Gated(lm.model.model.layers[1].mlp)
        lm.model.model.layers[1].forward = Added(lm.model.model.layers[1].forward).forward
        return lm

    config = settings(tiny_llama, "mlp.1")
    with pytest.raises(UsageError, match=r"^Site 'mlp\.1' is not confirmed on the loaded model"):
        harvest(config, tmp_path / "store", load=patched)
    assert not (tmp_path / "store" / "plan.json").exists()
    assert harvest(config, tmp_path / "store") is not None


def test_tokens_that_see_later_ones_are_refused() -> None:
    model = tiny_model("bert")
    resolve(model, ["resid.1"])
    model.config.is_decoder = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
        if hasattr(module, "is_decoder"):
            module.is_decoder = False
    with pytest.raises(UsageError, match="tokens see later tokens"):
        resolve(model, ["resid.1"])


def test_the_width_of_a_site_is_checked_in_every_pass() -> None:
    model = built("Llama")
    (site,) = resolve(model, ["mlp.1"])
    lm = LanguageModel(model, None, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^Site 'mlp\.1': .* gives \(2, 5, 32\) in this pass; \(2, 5, 16\) is needed"):
        capture(lm, [site.model_copy(update={"d_in": 16})], torch.randint(3, 60, (2, 5)))


def test_a_part_that_several_modules_make_is_captured_and_edited_as_their_sum() -> None:
    model = tiny_model("granitemoehybrid")
    (site,) = resolve(model, ["mlp.1"])
    assert site.module == "model.layers.1.block_sparse_moe + model.layers.1.shared_mlp"
    lm = LanguageModel(model, None, None)  # type: ignore[arg-type]
    tokens = torch.randint(3, 60, (2, 9))
    layer, kept = model.model.layers[1], {}
    for name in ("block_sparse_moe", "shared_mlp"):
        getattr(layer, name).register_forward_hook(
            lambda module, args, output, name=name: kept.__setitem__(
                name, output[0] if isinstance(output, tuple) else output
            )
        )
    found = capture(lm, [site], tokens)["mlp.1"]
    assert torch.equal(found, (kept["block_sparse_moe"].reshape(found.shape) + kept["shared_mlp"]))
    losses, divergences = effects(lm, site, tokens, [lambda value: value, torch.zeros_like])
    torch.testing.assert_close(losses[1], losses[0])
    assert divergences[2].abs().max() > 1e-4


def test_the_manifest_says_what_was_confirmed_and_a_copy_keeps_it(tiny_llama: Path, tmp_path: Path) -> None:
    from gsae.store import copy

    sites = ("mlp.1", "attn.0", "resid.2", "module:model.layers.1.mlp.up_proj:out")
    config = settings(tiny_llama, *sites)
    store = harvest(config, tmp_path / "store")
    assert store is not None
    assert store.manifest.confirmed == {
        "mlp.1": ("added", "complete", "separate"),
        "attn.0": ("decides", "linear", "removed"),
        "resid.2": ("chained", "causal"),
        sites[3]: ("width",),
    }
    assert not (tmp_path / "store" / "confirmed.json").exists()
    assert "confirmed" not in (tmp_path / "store" / "plan.json").read_text()
    copy(tmp_path / "store", tmp_path / "copied", sites=["mlp.1"])
    assert open_store(tmp_path / "copied").manifest.confirmed == {"mlp.1": ("added", "complete", "separate")}
