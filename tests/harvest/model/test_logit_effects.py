"""The direct effect of a direction on the logits equals each family's norm and output embedding; texts of token ids."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gsae.harvest import LanguageModel, logit_effects, resolve, token_texts
from gsae.tests.support.families import FAMILIES, built
from gsae.tests.support.selection import mostly_slow

OF_ATTENTION = {  # the norm that an attention's output goes through before it is added to the residual stream
    "Gemma2": "post_attention_layernorm",
    "Gemma3": "post_attention_layernorm",
    "Olmo2": "post_attention_layernorm",
    "Glm4": "post_self_attn_layernorm",
}


def through(norm: Any, family: str, directions: Tensor) -> Tensor:
    """The linear part of a norm without its division, as in the family's code."""
    gain = norm.weight.detach()
    if isinstance(norm, nn.LayerNorm) or "LayerNorm" in type(norm).__name__:
        directions = directions - directions.mean(1, keepdim=True)
    return directions * (1 + gain if family.startswith("Gemma") else gain)


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "Llama", "GPT2", "Gemma2"))
def test_the_direct_path_of_every_family_is_its_norm_and_output_embedding(family: str) -> None:
    model = built(family)
    draw = torch.Generator().manual_seed(3)
    own = FAMILIES[family]
    final, layer = model.get_submodule(own.final), model.get_submodule(own.layers)[1]
    norms = [
        module for module in model.modules() if getattr(module, "weight", None) is not None and module.weight.ndim == 1
    ]
    assert final in norms
    for parameter in (parameter for norm in norms for parameter in norm.parameters()):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    head = model.get_output_embeddings().weight.detach()
    for name in ("resid.1", "mlp.1", "attn.1"):
        site = resolve(model, [name])[0]
        effects = logit_effects(LanguageModel(model, None, None), site)  # type: ignore[arg-type]
        assert effects is not None
        directions = torch.randn(5, site.d_in, generator=draw)
        written = directions
        if name == "attn.1":
            projection = model.get_submodule(site.module)
            written = projection(directions) - projection(torch.zeros_like(directions))
            if family in OF_ATTENTION:
                written = through(layer.get_submodule(OF_ATTENTION[family]), family, written)
        expected = through(final, family, written) @ head.T
        torch.testing.assert_close(effects(directions), expected.detach(), rtol=1e-4, atol=1e-4)


def test_an_arbitrary_module_has_no_direct_effect_on_logits() -> None:
    model = built("Llama")
    site = resolve(model, ["module:model.layers.1.mlp.up_proj:out"])[0]
    assert logit_effects(LanguageModel(model, None, None), site) is None  # type: ignore[arg-type]


def test_every_token_id_has_a_text(tiny_tokenizer: Any) -> None:
    texts = token_texts(tiny_tokenizer)
    assert len(texts) == len(tiny_tokenizer)
    ids = tiny_tokenizer("the house")["input_ids"]
    assert "".join(texts[token] for token in ids).replace(" ", "") == "thehouse"
