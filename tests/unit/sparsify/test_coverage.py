"""What pruning leaves dense is counted, named, and said by the folder itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from sparsify.formats.kinds.packed import save_packed_folder
from sparsify.formats.sparse_folder import described, read_sparsity, write_sparsity
from sparsify.formats.verify import check_files, check_packed
from sparsify.models.load import load_model
from sparsify.models.masked import apply_masks_, infer_masks
from sparsify.models.save import save_model
from sparsify.models.structure import fused_experts
from sparsify.pattern import Pattern
from sparsify.pruning.coverage import coverage

SHARED = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0}


def shapes(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_model_of_linear_layers_leaves_nothing_unsaid(tiny_model: Any) -> None:
    found = coverage(tiny_model)
    assert found.remark() is None
    per_block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    assert found.num_in_layers == 2 * per_block
    assert found.num_weights == sum(p.numel() for p in tiny_model.parameters())
    assert coverage(tiny_model, ["mlp.*"]).num_in_layers == 2 * (2 * 64 * 64 + 2 * 64 * 32)
    assert coverage(tiny_model, ["mlp.*"]).remark() is None  # asked for


def test_fused_experts_are_said(tmp_path: Path) -> None:
    config = GptOssConfig(
        **SHARED, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=0,
    )  # fmt: skip
    model = shapes(config)
    found = coverage(model)
    experts = 2 * 4 * (16 * 64 + 64 + 32 * 16 + 16)
    router = 2 * 4 * 16
    assert found.num_left == experts + router
    said = found.remark()
    assert said is not None and "such as model.layers.0.mlp.experts.gate_up_proj" in said
    assert f"{found.num_left / found.num_weights:.1%} of the weights" in said


def test_experts_one_below_the_other_are_seen() -> None:
    model = shapes(
        DbrxConfig(
            **SHARED, d_model=16, n_layers=2, n_heads=2, max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        )
    )  # fmt: skip
    names = fused_experts(model)
    assert len(names) == 6 and all(".experts.mlp." in name for name in names)
    assert coverage(model).num_left >= 2 * 3 * 4 * 16 * 32


def test_a_folder_says_how_much_of_it_is_zero(tmp_path: Path, tiny_tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), None, tmp_path / "model")
    model, pattern = load_model(tmp_path / "model"), Pattern.parse("2:4")
    masks = infer_masks(model, pattern, ["*.mlp.*"], may_be_dense=True)
    apply_masks_(model, masks)
    sparse, packed = tmp_path / "sparse", tmp_path / "packed"
    save_model(model, None, sparse)
    write_sparsity(sparse, masks, "2:4", "magnitude", {})
    save_packed_folder(packed, model, tiny_tokenizer, masks, pattern, None, sparse)
    num_weights = sum(p.numel() for p in model.parameters())
    num_zeros = sum(int((p == 0).sum()) for p in model.parameters())
    num_pruned = 2 * 4 * 16 * 16 // 2
    for folder in (sparse, packed):
        sparsity = read_sparsity(folder) or {}
        about = sparsity["model"]
        assert about["num_weights"] == num_weights
        assert about["num_pruned"] == num_pruned
        assert about["dense"]["model.layers.0.mlp.up_proj.weight"] == 16 * 32
        assert "model.layers.0.self_attn.q_proj.weight" not in about["dense"]
        assert sum(about["dense"].values()) == num_weights - 2 * num_pruned
        text = described(sparsity)
        assert text is not None and text.startswith(f"{num_pruned / num_weights:.1%} of all weig")
        assert "the largest of them model.embed_tokens.weight" in text
    for counts in (check_files(sparse, masks, pattern), check_packed(packed)):
        assert counts["num_model_weights"] == num_weights  # tied ones once
        assert counts["num_model_zeros"] == num_zeros
        assert counts["num_zeros"] == num_pruned and counts["num_weights"] == 2 * num_pruned
    assert described({}) is None
