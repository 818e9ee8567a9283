"""FLOPs of a model: against the published table, and against an instrumented forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, in_two_documents, tiny, token_rows
from torch.utils.flop_counter import FlopCounterMode
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

from jobs.benchmarks.support.families import family_config
from jobs.benchmarks.support.random_llama import llama_config
from sparsify.costs.flops import (
    ModelFlops,
    count_flops,
    distillation_flops,
    document_lengths,
    mfu,
    peak_flops,
)
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError


@pytest.fixture(scope="module")
def llama_8b() -> ModelFlops:
    with torch.device("meta"):
        config = llama_config("llama-3.1-8b", 32, 8192, 128256)
        return count_flops(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("length", "student", "teacher", "total"),
    [(2048, 46.6, 15.5, 62.2), (4096, 48.2, 16.1, 64.3), (8192, 51.5, 17.2, 68.6)],
)
def test_llama_8b_distilled_by_itself(
    llama_8b: ModelFlops, length: int, student: float, teacher: float, total: float
) -> None:
    """GFLOP per token; to the table's last digit."""
    alone = distillation_flops(llama_8b, None, [length]) / length / 1e9
    both = distillation_flops(llama_8b, llama_8b, [length]) / length / 1e9
    assert alone == pytest.approx(student, abs=0.05)
    assert both - alone == pytest.approx(teacher, abs=0.05)
    assert both == pytest.approx(total, abs=0.1)  # the table adds unrounded figures


def test_llama_8b_weights_and_reference_speed(llama_8b: ModelFlops) -> None:
    assert llama_8b.num_block_weights == pytest.approx(6.979e9, rel=1e-4)
    assert llama_8b.num_head_weights == 128256 * 4096
    per_token = distillation_flops(llama_8b, llama_8b, [8192]) / 8192
    peak = peak_flops("NVIDIA H100 80GB HBM3")
    assert peak is not None
    # 32 GPUs at 4,340 tokens/s each: 30 % of the chip.
    assert mfu(32 * 4340, per_token, peak, 32) == pytest.approx(0.301, abs=0.001)


def counted_by_hook(model: torch.nn.Module, rows: TokenRows) -> int:
    """What PyTorch counts in a forward with plain matmuls, without the rotary angles."""
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=rows.ids_NT, use_cache=False)
    rotary = sum(
        sum(by_op.values())
        for name, by_op in counter.get_flop_counts().items()
        if name.endswith("rotary_emb")
    )
    return counter.get_total_flops() - rotary


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_what_the_model_multiplies(family: str) -> None:
    """The dense forward multiplies the whole square of scores, we count half of it."""
    model = tiny(family)
    flops = count_flops(model)
    rows = token_rows(2, num_tokens=6)  # as long as the windows, so that none of them bites
    half = flops.forward([6, 6])
    attention = 4 * flops.attention_width * 3 * 2 * 6**2 / 2
    assert half + attention == counted_by_hook(model, rows)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_only_active_experts_count(family: str) -> None:
    experts = {"Mixtral": "num_local_experts", "Qwen3Moe": "num_experts"}[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, moe_intermediate_size=48,
        num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, **{experts: 4},
    )  # fmt: skip
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    flops = count_flops(model)
    attention = 4 * flops.attention_width * 2 * 2 * 6**2 / 2
    assert flops.forward([6, 6]) + attention == counted_by_hook(model, token_rows(2, num_tokens=6))


@pytest.mark.parametrize("window", [None, 1, 4, 9, 20])
def test_pairs_of_a_window(window: int | None) -> None:
    """Token i sees min(i, w) tokens; the convention leaves out half the diagonal of the ramp."""
    length = 9
    flops = ModelFlops(0, 0, 1, (window, None))
    seen = sum(min(i + 1, window or length) for i in range(length))
    full = sum(i + 1 for i in range(length))
    # n (n + 1) / 2 pairs against n^2 / 2, and the same over the first w tokens.
    diagonal = min(length, window or length) / 2 + length / 2
    assert flops.forward([length]) / 4 == pytest.approx(seen + full - diagonal)


@pytest.mark.parametrize("chunk", [1, 3, 4, 9, 20])
def test_pairs_of_chunks(chunk: int) -> None:
    """A token sees those of its chunk up to itself; the convention leaves out half the diagonal."""
    length = 9
    flops = ModelFlops(0, 0, 1, (None,), (chunk, chunk))
    seen = sum(i % chunk + 1 for i in range(length))
    full = sum(i + 1 for i in range(length))
    assert flops.forward([length]) / 4 == 2 * seen + full - 3 * length / 2


def test_layers_of_llama_4_are_counted_by_what_they_attend_to() -> None:
    """Every fourth layer sees the whole document, the others the chunk: as its masks have it."""
    config = family_config("llama4_text", num_hidden_layers=4, attention_chunk_size=5)
    config.layer_types = ["chunked_attention"] * 3 + ["full_attention"]
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    flops = count_flops(model)
    assert flops.windows == (None,) and flops.chunks == (5, 5, 5)
    given = {
        "config": model.config, "inputs_embeds": torch.zeros(1, 12, 32), "past_key_values": None,
        "attention_mask": torch.ones(1, 12), "position_ids": torch.arange(12)[None],
    }  # fmt: skip
    model.config._attn_implementation = "eager"
    whole, chunked = (
        int(make(**given).eq(0).sum()) for make in (create_causal_mask, create_chunked_causal_mask)
    )
    seen = whole + 3 * chunked
    assert whole == 12 * 13 / 2 > chunked
    with_weights = 2 * (flops.num_block_weights + flops.num_head_weights) * 12
    attention = 4 * flops.attention_width * (seen - 4 * 12 / 2)
    assert flops.forward([12]) == with_weights + attention


def test_packed_documents_cost_the_sum_of_their_squares() -> None:
    rows = in_two_documents(token_rows(3, num_tokens=16))
    lengths = document_lengths(rows)
    assert lengths == [2, 14, 3, 13, 4, 12]
    flops = count_flops(tiny("Llama"))
    packed, whole = flops.forward(lengths), flops.forward([16] * 3)
    squares = sum(n**2 for n in lengths) - 3 * 16**2
    assert packed - whole == 2 * flops.attention_width * 3 * squares
    assert document_lengths(token_rows(2, num_tokens=16)) == [16, 16]


def test_teacher_without_head_costs_less() -> None:
    flops = count_flops(tiny("Llama"))
    with_head, without = (distillation_flops(flops, flops, [16], on) for on in (True, False))
    assert with_head - without == 2 * 16 * flops.num_head_weights


def test_work_that_is_not_known_is_refused() -> None:
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    )
    with pytest.raises(InputError, match="FLOPs cannot be counted"):
        count_flops(mamba)
    with pytest.raises(InputError, match="output layer"):
        count_flops(tiny("Llama").model)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362.05), ("NVIDIA L4", 121),
    ],
)  # fmt: skip
def test_peaks_by_name(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize("name", ["cpu", "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA X9000"])
def test_no_peak_rather_than_a_wrong_one(name: str) -> None:
    assert peak_flops(name) is None
