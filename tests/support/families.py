"""The decoder families that sites are checked on: tiny random models, and how each is built."""

from dataclasses import dataclass, field
from typing import Any

import torch

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


@dataclass(frozen=True)
class Family:
    """How a family's layers are built, written down from its own code: what the sites are checked against.

    layers, final: the paths of the list of layers and of the norm after it. attention: the path of an attention in its
    layer, whose output is what it adds; projection: of the output projection in it. between: the module whose input is
    the residual stream between attention and MLP, None where both read the same (parallel). mlp: the path in a layer
    of the module whose output is what the MLP adds.
    """

    layers: str = "model.layers"
    final: str = "model.norm"
    attention: str = "self_attn"
    projection: str = "o_proj"
    between: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    config: str = ""
    model: str = ""


NO_HEADS = ("head_dim", "num_key_value_heads")
GPT2_LIKE = {"layers": "transformer.h", "final": "transformer.ln_f", "attention": "attn", "without": NO_HEADS}
SELF_ATTENTION = {"attention": "self_attention", "projection": "dense"}
FAMILIES = {
    "Llama": Family(),
    "Mistral": Family(),
    "Mixtral": Family(settings={"num_local_experts": 4}),
    "Qwen2": Family(),
    "Qwen3": Family(),
    "Qwen3Moe": Family(settings={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "Gemma": Family(),
    "Gemma2": Family(between="pre_feedforward_layernorm", mlp="post_feedforward_layernorm"),
    "Gemma3": Family(between="pre_feedforward_layernorm", mlp="post_feedforward_layernorm", config="Gemma3TextConfig"),
    "Phi3": Family(),
    "Olmo2": Family(between="mlp", mlp="post_feedforward_layernorm"),
    "Glm4": Family(mlp="post_mlp_layernorm"),
    "StableLm": Family(without=("head_dim",)),
    "GPT2": Family(**GPT2_LIKE, projection="c_proj", between="ln_2", model="GPT2LMHeadModel"),
    "GPTBigCode": Family(**GPT2_LIKE, projection="c_proj", between="ln_2"),
    "GPTJ": Family(**GPT2_LIKE, projection="out_proj", between=None, settings={"rotary_dim": 4}),
    "GPTNeoX": Family(
        layers="gpt_neox.layers",
        final="gpt_neox.final_layer_norm",
        attention="attention",
        projection="dense",
        between=None,
        without=NO_HEADS,
    ),
    "OPT": Family(
        layers="model.decoder.layers",
        final="model.decoder.final_layer_norm",
        projection="out_proj",
        between="final_layer_norm",
        mlp="fc2",
        settings={"word_embed_proj_dim": 32, "ffn_dim": 48},
        without=(*NO_HEADS, "intermediate_size"),
    ),
    "Falcon": Family(**(GPT2_LIKE | SELF_ATTENTION), between=None),
    "Bloom": Family(**(GPT2_LIKE | SELF_ATTENTION), mlp="mlp.dense_4h_to_h"),
}


def built(family: str, device: str = "cpu", **changed: Any) -> Any:
    """Return a tiny random model of a family; changed: sizes that differ from SIZES."""
    import transformers

    own = FAMILIES[family]
    config = getattr(transformers, own.config or f"{family}Config")
    sizes = {name: value for name, value in (SIZES | changed).items() if name not in own.without}
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return getattr(transformers, own.model or f"{family}ForCausalLM")(config(**sizes, **own.settings)).eval()
