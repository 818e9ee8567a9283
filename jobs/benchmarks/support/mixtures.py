"""Mixtures of experts of public shapes, and one for benchmarks on a CPU."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig

MIXTURES: dict[str, dict[str, int]] = {
    "qwen3-30b-a3b": {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_hidden_layers": 48,
    },
    "bench-512-moe": {
        "hidden_size": 512, "moe_intermediate_size": 384, "num_experts": 16,
        "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 64, "num_hidden_layers": 8,
    },
}  # fmt: skip
"""Shapes by name; every block has experts."""


def mixture_config(
    sizes: dict[str, int], num_blocks: int, num_positions: int, vocab_size: int
) -> Qwen3MoeConfig:
    """Configuration of `num_blocks` blocks of these sizes, one of `MIXTURES`."""
    wanted: dict[str, Any] = {**sizes, "num_hidden_layers": num_blocks}
    return Qwen3MoeConfig(
        **wanted,
        vocab_size=vocab_size,
        max_position_embeddings=num_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
