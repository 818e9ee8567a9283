"""Tiny random models of nine families whose layers are known by heart, and rows for them.

All families, made small in the same way, are in `jobs.benchmarks.support.families`.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn

from jobs.benchmarks.support.families import in_two_documents as in_two_documents
from sparsify.data.rows import TokenRows
from sparsify.methods import PruneParams

GATED = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
FAMILIES = {
    "Llama": GATED,
    "Mistral": GATED,
    "Qwen2": GATED,
    "Qwen3": GATED,
    "Gemma": GATED,
    "Gemma2": GATED,
    # Attention and MLP of a Phi block run side by side on the same normalised input.
    "Phi": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"],
        ["self_attn.dense"],
        ["mlp.fc2"],
    ],
    "Phi3": [
        ["self_attn.qkv_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_up_proj"],
        ["mlp.down_proj"],
    ],
    "OPT": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ],
}


# A search and a refit of few steps, for what does not depend on how many there are.
FEW_STEPS = PruneParams(block_size=16, refit_iterations=2, descent_sweeps=1, admm_iterations=3)


def tiny(family: str, num_layers: int = 3, seed: int = 0) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=num_layers, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for field, value in {
        "intermediate_size": 48, "ffn_dim": 48, "num_key_value_heads": 2, "head_dim": 8,
        "word_embed_proj_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 8,
    }.items():  # fmt: skip
        if hasattr(config, field):
            setattr(config, field, value)
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def token_rows(num_rows: int, num_tokens: int = 16, seed: int = 1) -> TokenRows:
    generator = torch.Generator().manual_seed(seed)
    return TokenRows.whole(torch.randint(3, 64, (num_rows, num_tokens), generator=generator))
