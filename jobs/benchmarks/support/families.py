"""Decoder-only families of transformers, each made small at random from its own config class.

A list that the table of families and the tests share. Random weights show what a model's shape
allows; they say nothing of quality.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sparsify.data.rows import TokenRows

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "ffn_dim": 48,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, "sliding_window": 6,
    "query_pre_attn_scalar": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "initializer_range": 0.15,
    "time_step_rank": 4, "mamba_dt_rank": 4, "chunk_size": 16, "mamba_chunk_size": 16,
}  # fmt: skip
"""what every family is given of these, under the names that its config knows"""

# Attention with compressed keys rotates a part of each head, and only that.
_COMPRESSED: dict[str, Any] = {
    "head_dim": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip

_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip

_STATE: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": "auto", "mamba_expand": 2}

_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip

_AS_THEY_ARE = (
    "afmoe", "apertus", "arcee", "bert-generation", "biogpt", "bitnet", "bloom", "cohere",
    "cohere2", "diffllama", "doge", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_mamba",
    "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_neox_japanese", "gpt_oss", "granite", "granitemoe", "helium",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "jetmoe", "lfm2", "llama", "llama4_text", "mamba",
    "minimax", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder",
    "mpt", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "openai-gpt", "opt",
    "persimmon", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "recurrent_gemma",
    "rwkv", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm",
    "xlm", "xlstm",
)  # fmt: skip

_WITH_MORE: dict[str, dict[str, Any]] = {
    "bamba": _STATE,
    "bert": {"is_decoder": True},
    "codegen": {"rotary_dim": 4},
    "cpmant": {
        "dim_head": 8, "dim_ff": 48, "position_bias_num_buckets": 32,
        "position_bias_max_distance": 64,
    },
    "ctrl": {"dff": 48},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _COMPRESSED,
    "deepseek_v3": _COMPRESSED,
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_n_groups": 1,
        "mamba_d_state": 16,
    },
    "gemma3": {"vision_config": _VISION, "mm_tokens_per_image": 4},
    "gemma4_text": {"hidden_size_per_layer_input": 8},
    "glm4_moe_lite": _COMPRESSED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        **_STATE, "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 48,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "minicpm3": _COMPRESSED,
    "nemotron_h": {
        "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": _LINEAR,
    "phi": {"num_key_value_heads": 4},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = dict(
    sorted({**{name: {} for name in _AS_THEY_ARE}, **_WITH_MORE}.items())
)
"""model_type of transformers -> what else its config is given"""

SKIP = {"mamba": ["*.dt_proj"], "falcon_mamba": ["*.dt_proj"]}
"""families with layers whose weights are used without being called -> `prune.skip`"""


def family_config(model_type: str, **sizes: Any) -> PretrainedConfig:
    """A small configuration of a family.

    Args:
        model_type: a name in `FAMILIES`.
        sizes: in place of the usual ones, under the names that the config knows.
    """
    kind = CONFIG_MAPPING[model_type]
    known = set(kind.attribute_map)
    for parent in kind.__mro__:
        known |= set(getattr(parent, "__annotations__", {}))
    usual = {name: value for name, value in {**_SIZES, **sizes}.items() if name in known}
    if "vocab_size_per_layer_input" in known:
        usual["vocab_size_per_layer_input"] = usual["vocab_size"]
    if "text_config" in known:  # a family with eyes: its sizes are those of its text model
        text = kind.sub_configs["text_config"]
        usual = {"text_config": vars(family_config(text.model_type, **sizes))}
    return kind(**{**usual, **FAMILIES.get(model_type, {})})


def random_family(model_type: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A small float32 model of a family with random weights, the same for the same seed.

    Args:
        model_type: a name in `FAMILIES`.
        seed: of the weights.
        sizes: see `family_config`.
    """
    config = family_config(model_type, **sizes)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in model.parameters():  # vectors of zeros or ones would hide mistakes
        if weight.ndim == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    return model.eval()


def in_two_documents(rows: TokenRows) -> TokenRows:
    """The same rows, each cut into two documents at another place."""
    positions_NT = rows.positions_NT.clone()
    for row in range(len(rows)):
        start = 2 + row % (positions_NT.shape[1] - 2)
        positions_NT[row, start:] -= start
    return TokenRows(rows.ids_NT, positions_NT)
