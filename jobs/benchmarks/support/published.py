"""Figures that others published of training and serving, beside what would have been planned.

Settings are those that the sources give. What they run is other software, often with other
kernels, so a ratio says how well the plan's picture of such work carries over, no more. What cannot
be planned here is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, Qwen3Config

from jobs.planning.choices import offload_seconds
from jobs.planning.models import shape_of
from sparsify.costs.cards import cards
from sparsify.costs.deploy import (
    AdapterTraining,
    adapter_memory,
    deployed_sizes,
    kv_cache_bytes,
)
from sparsify.costs.layout import Training
from sparsify.costs.memory import training_memory
from sparsify.costs.seconds import rates_of, step_seconds, total
from sparsify.costs.shapes import ModelShape, read_shape

_STAS = "github.com/stas00/ml-engineering, insights/when-to-upgrade-gpus"
_TITAN = "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
_FOUNDRY = "github.com/mosaicml/llm-foundry, scripts/train/benchmarking"
_CARD = "huggingface.co/neuralmagic/Sparse-Llama-3.1-8B-2of4"
_NEXTAI = "arXiv 2604.09034, by a summary"


@dataclass(frozen=True)
class Published:
    """One figure, and what was planned for it."""

    what: str
    unit: str
    published: float
    planned: float
    source: str

    @property
    def ratio(self) -> float:
        """Planned over published."""
        return self.planned / self.published


NOT_PLANNED = (
    ("NeMo, Llama-3.1-8B in FP8, 8 H100", "14,451 tokens/s a GPU",
     "the engine here trains in bf16 and fp32 alone"),
    ("torchtitan and torchao in FP8, 8 to 64 GPUs", "6,768 to 10,938 tokens/s a GPU",
     "as before"),
    ("NeMo, 70B in FP8, 64 H100", "1,602 to 1,664 tokens/s a GPU", "as before"),
    ("Megatron-LM up to 462B, MegaScale 175B", "47 % and 55 % MFU",
     "tensor and pipeline parallel"),
    ("ModelOpt, Nemotron 9B to 7B and 30B-A3B, distilled", "2,470 to 3,086 tokens/s a GPU",
     "recurrent layers, whose work is not counted"),
    ("Llama-3.1-8B with DeepSpeed, no Liger", "99 GiB",
     "whole logits, where the loss here makes them in chunks"),
    ("QLoRA of 70B with and without FlashAttention 2", "46.95 and 68.13 GB",
     "rows and batch are not said"),
    ("llm-compressor GPTQ and SparseGPT's own code", "264 to 745 s; 175B in 4 h",
     "other programs, bound by launches"),
)  # fmt: skip
"""what, figure, why it is not compared"""


def compared() -> Iterator[Published]:
    """Every published figure that can be planned for."""
    llama, _ = shape_of("llama-3.1-8b")
    yield from _plain_training(llama)
    yield from _distilled(llama)
    yield from _memory(llama)


def _speed(
    shape: ModelShape, card: str, teacher: ModelShape | None, updated_on_host: bool = False,
    **layout: Any,
) -> float:  # fmt: skip
    setup = Training(element_bytes=2, gpus_per_node=8, has_head_kernel=False, **layout)
    seconds = total(step_seconds(shape, teacher, setup, rates_of(cards()[card], 2)))
    if updated_on_host:
        seconds += offload_seconds(shape.num_parameters / setup.world_size)
    return setup.tokens * setup.num_micro_batches / seconds


def _plain_training(llama: ModelShape) -> Iterator[Published]:
    speed = "tokens/s a GPU"
    long: dict[str, Any] = {"sequence_length": 8192}
    yield Published(
        "DeepSpeed ZeRO-2, Llama-3.1-8B, 8 H200", speed, 8957,
        _speed(llama, "h200", None, world_size=8, **long), _STAS,
    )  # fmt: skip
    yield Published(
        "the same, ZeRO-3, all recomputed, offloaded (its update sets the plan's)", speed, 2740,
        _speed(llama, "h200", None, updated_on_host=True, world_size=8, zero_stage=3,
               recompute_share=1.0, **long), _STAS,
    )  # fmt: skip
    # Selective recomputing: every other product, half of the arithmetic that all would take.
    titan: dict[str, Any] = {"zero_stage": 3, "recompute_share": 0.5, **long}
    rows: tuple[tuple[str, float, dict[str, Any]], ...] = (
        ("torchtitan, 8 H100, eager", 5762, {"world_size": 8, "micro_batch_size": 2}),
        ("torchtitan, 8 H100, compiled", 6667,
         {"world_size": 8, "micro_batch_size": 2, "compile": True}),
        ("torchtitan, 128 H100, compiled", 6514,
         {"world_size": 128, "micro_batch_size": 2, "compile": True}),
        ("torchao, 8 H100, compiled", 6150, {"world_size": 8, "compile": True}),
    )  # fmt: skip
    for what, published, more in rows:
        source = _TITAN if "titan" in what else "github.com/pytorch/ao, docs, training"
        planned = _speed(llama, "h100", None, **titan, **more)
        yield Published(f"{what}, Llama-3.1-8B", speed, published, planned, source)
    mpt = read_shape(LlamaConfig(
        hidden_size=4096, intermediate_size=10922, num_attention_heads=32, num_hidden_layers=32,
        vocab_size=50432, tie_word_embeddings=True,
    ))  # fmt: skip
    yield Published(
        "llm-foundry 7B, 128 H100, rows of 2,048", speed, 10475,
        _speed(mpt, "h100", None, world_size=128, zero_stage=3, micro_batch_size=8), _FOUNDRY,
    )  # fmt: skip
    yield Published(
        "llm-foundry 7B, 8 H100, rows of 8,192, recomputed", speed, 6935,
        _speed(mpt, "h100", None, world_size=8, zero_stage=3, micro_batch_size=2,
               recompute_share=1.0, **long), _FOUNDRY,
    )  # fmt: skip


def _distilled(llama: ModelShape) -> Iterator[Published]:
    sparse = _speed(
        llama, "h100", llama, world_size=32, zero_stage=3, micro_batch_size=2,
        sequence_length=8192, num_micro_batches=2, recompute_share=1.0,
        teacher_placement="sharded", square_head=True,
    )  # fmt: skip
    yield Published(
        "Sparse Llama 3.1 8B: 13 B tokens distilled on 32 H100", "hours", 26.0,
        13e9 / sparse / 32 / 3600, _CARD,
    )  # fmt: skip

    def qwen(layers: int) -> ModelShape:
        return read_shape(Qwen3Config(
            hidden_size=4096, intermediate_size=12288, num_attention_heads=32,
            num_key_value_heads=8, num_hidden_layers=layers, vocab_size=151936, head_dim=128,
            tie_word_embeddings=False,
        ))  # fmt: skip

    student, teacher = qwen(24), qwen(36)
    layout: dict[str, Any] = {"sequence_length": 4096, "num_micro_batches": 12}
    alone = _speed(student, "h100", teacher, world_size=64, zero_stage=1, **layout)
    shared = 1 / (1 / alone + 8 * _shared_products_seconds(student, teacher, "h100", 8))
    yield Published(
        "NeMo, Qwen3 8B to 6B distilled, tensor parallel, H100", "tokens/s a GPU", 4167, shared,
        "github.com/NVIDIA/TensorRT-Model-Optimizer, examples/nemo_run/prune_distill (README of "
        "December 2025: 90 B tokens in some 6,000 GPU-hours)",
    )  # fmt: skip


def _shared_products_seconds(
    student: ModelShape, teacher: ModelShape, card: str, gpus: int
) -> float:
    """Seconds for which every GPU of a group that shares its products waits for a token of theirs.

    Each block's two halves put their outputs together, forward and backward, a teacher forward
    alone: 2 (p - 1) / p of a token's hidden state every time, in half precision (Megatron-LM, arXiv
    1909.08053, section 3). NeMo's recipe does nothing meanwhile. The engine here does not share
    products, so this is no part of the plan.
    """
    times = 4 * student.num_blocks + 2 * teacher.num_blocks
    sent = 2.0 * student.hidden_size * 2 * (gpus - 1) / gpus
    return times * sent / rates_of(cards()[card], 2).link


def _memory(llama: ModelShape) -> Iterator[Published]:
    setup = Training(world_size=8, gpus_per_node=8, sequence_length=8192)
    yield Published(
        "DeepSpeed ZeRO-2 with Liger, Llama-3.1-8B, 8 H200", "GiB", 80,
        training_memory(llama, None, setup).total / 2**30, _STAS,
    )  # fmt: skip
    large, _ = shape_of("llama-2-70b")
    sizes = {(d.format, d.is_packed): d.weight_bytes / 1e9 for d in deployed_sizes(large)}
    rank = [sum(adapter_memory(large, AdapterTraining(rank=r)).values()) / 1e9 for r in (4, 64)]
    yield Published("Llama-2-70B, QLoRA on one A100 of 40 GB", "GB", 39.56, rank[0], _NEXTAI)
    yield Published("the same, rank 64 over rank 4", "GB", 4.78, rank[1] - rank[0], _NEXTAI)
    meta = "arXiv 2307.09288, sizes by its config"
    yield Published("Llama-2-70B in bf16", "GB", 140, sizes["bf16", False], "arXiv 2403.17887")
    yield Published("Llama-2-70B in 8 bits", "GB", 69.0, sizes["int8", False], meta)
    yield Published("Llama-2-70B in 4 bits", "GB", 34.5, sizes["int4", False], meta)
    yield Published(
        "its keys and values of 4,096 tokens", "GB", 1.34, kv_cache_bytes(large, 4096) / 1e9, meta
    )
    small = {(d.format, d.is_packed): d.weight_bytes / 1e9 for d in deployed_sizes(llama)}
    for what, published, key in (
        ("Sparse Llama 3.1 8B in bf16", 16.07, ("bf16", False)),
        ("the same in FP8", 9.08, ("fp8", False)),
        ("the same, 2:4 packed in 4 bits", 4.83, ("int4", True)),
    ):
        yield Published(what, "GB", published, small[key], _CARD)
