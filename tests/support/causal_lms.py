"""Tiny random models of every causal language model that transformers has, with the sizes that need a hand."""

import inspect
from typing import Any

import torch
from torch import nn

LANGUAGE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "is_decoder": True,
}
TOWER = {
    **dict.fromkeys(
        ("hidden_size", "embed_dim", "d_model", "out_hidden_size", "projection_dim", "output_channels"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim"), 48),
    "vision_output_dim": 32,
    "num_global_layers": 1,
    "image_size": 28,
    "patch_size": 14,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
}
INDEXED = {**LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8}
SLIDING = {**LATENT, "num_attention_heads": 4, "head_dim": 12}
DECODER = {"decoder_attention_heads": 4, "decoder_layers": 3, "decoder_ffn_dim": 48, "encoder_attention_heads": 4}
# Of the four transformers of BLT; the one over patches is as wide as two states of the encoder.
BYTES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "bart": DECODER,
    "bigbird_pegasus": DECODER,
    "blenderbot": DECODER,
    "blenderbot-small": DECODER,
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": BYTES,
        "encoder_config": {**BYTES, "hidden_size_global": 64, "cross_attn_k": 2},
        "decoder_config": {**BYTES, "hidden_size_global": 64, "cross_attn_k": 2},
        "global_config": {**BYTES, "hidden_size": 64},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 1},
    "deepseek_v32": INDEXED,
    "dots1": {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {**INDEXED, **{f"swa_{name}": size for name, size in SLIDING.items()}},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 2},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": 96,
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 8,
    },
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": INDEXED,
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, **MAMBA, "shared_intermediate_size": 48},
    "granitemoeshared": {"shared_intermediate_size": 48},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {**LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {
        **LATENT,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "marian": DECODER,
    "mbart": DECODER,
    "minicpm3": LATENT,
    "minimax": {"block_size": 32, "layer_types": ["linear_attention", "full_attention"] * 2},
    "mvp": DECODER,
    "nemotron_h": {
        "hybrid_override_pattern": "M-*E",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
    },
    "pegasus": DECODER,
    "plbart": DECODER,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": {**LINEAR, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "qwen3_next": LINEAR,
    "qwen4_exp_text": {
        **LINEAR,
        "shared_expert_intermediate_size": 16,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2},
    "whisper": DECODER,
    "xlnet": {"d_head": 8, "n_head": 4, "d_model": 32},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": LATENT,
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "chunk_size": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
LARGEST = 120_000_000


def tiny_config(family: str) -> Any:
    """Return the config of a tiny model of a family, by its name in transformers' mapping."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    given = _known(kind, LANGUAGE) | OWN.get(family, {})
    for name, own in (getattr(kind, "sub_configs", None) or {}).items():
        if name in given:
            continue
        default = (getattr(kind, "sub_configs_defaults", None) or {}).get(name)
        family_of = getattr(default, "model_type", None) or getattr(own, "model_type", "")
        # No `get`: the mapping loads its configs when they are indexed.
        own = CONFIG_MAPPING[family_of] if family_of in CONFIG_MAPPING else own  # noqa: SIM401
        sizes = LANGUAGE if any(word in name for word in ("text", "decoder", "language")) else TOWER
        given[name] = {"model_type": family_of} | _known(own, sizes) | OWN.get(family_of, {})
    return kind(**given)


def tiny_model(family: str) -> Any:
    """Return a tiny random model of a family, with weights that make every part matter.

    Raises what transformers raises, and ValueError for a model that is not tiny.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in build(config).parameters())
    if size > LARGEST:
        raise ValueError(f"a tiny {family} has {size:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(config).float().eval()
        _stir(model)
    return model


def _known(kind: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes that a config has."""
    names = set(inspect.signature(kind.__init__).parameters)
    for base in kind.__mro__:
        names |= set(vars(base).get("__annotations__", {})) | set(vars(base).get("attribute_map", None) or {})
    return {name: value for name, value in sizes.items() if name in names}


def _stir(model: nn.Module) -> None:
    """Give matrices values that keep the size of what they multiply, and vectors values that are not all alike."""
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape)
        if parameter.dim() > 1:
            parameter.data.copy_(values / parameter.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            parameter.data.copy_(0.1 * values)
        else:
            parameter.data.mul_(1 + 0.2 * values.tanh()).add_(0.05)
