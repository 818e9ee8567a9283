"""Sizes of a model that is served, and of one that is fine-tuned through adapters."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.costs.layout import Recompute
from sparsify.costs.roofline import matrix_bytes
from sparsify.costs.shapes import ModelShape, kept_bytes
from sparsify.pattern import Pattern

FORMATS = ("bf16", "fp8", "int8", "int4")

_BITS = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}

_GROUP = 128  # input features that share a scale of int4, stored in float16

_SCALE_BITS = 16

_NF4_OVERHEAD_BITS = 0.127  # of double quantisation, for each weight: QLoRA (arXiv 2305.14314), 3

_ADAPTER_BYTES = 12.0  # bf16 weight and gradient, two float32 moments

_WORKSPACE = 1.0e9  # CUDA's context and kernels' workspaces


@dataclass(frozen=True)
class Deployed:
    """One way to serve a model."""

    format: str
    """bf16, fp8, int8 or int4: type of the weights of the blocks' linear layers"""
    is_packed: bool
    """2:4 without its zeros; else dense, where zeros take their room"""
    weight_bytes: float
    """of all weights and scales"""


def deployed_sizes(shape: ModelShape, kept_bytes: int = 2) -> list[Deployed]:
    """Bytes of a model in every format, dense and packed.

    Linear layers of the blocks are in the format, all else stays in half precision. Packed 2:4
    stores two of four values and 2 bits for the place of each: 9 bits a weight in bf16, 5 in 8
    bits, 3 in int4 (`roofline.matrix_bytes`, and `packed.layout`). Scales: float16 for 128 input
    features in int4, one a row in 8 bits.

    Args:
        shape: of the model.
        kept_bytes: of an element of what stays.
    """
    found = []
    for name in FORMATS:
        for pattern in (None, Pattern.parse("2:4")):
            blocks = 0.0
            for rows, columns in shape.layers:
                blocks += matrix_bytes((rows, columns), pattern, _BITS[name])
                scales = {"bf16": 0, "int4": -(-columns // _GROUP)}.get(name, 1)
                blocks += rows * scales * _SCALE_BITS / 8
            first = sum(rows * columns for rows, columns in shape.layers)
            inside = blocks * shape.linear_parameters / first
            rest = kept_bytes * (shape.num_parameters - shape.linear_parameters)
            found.append(Deployed(name, pattern is not None, inside + rest))
    return found


def kv_cache_bytes(shape: ModelShape, tokens: float, element_bytes: int = 2) -> float:
    """Keys and values of so many tokens: 2 for each layer, key head and feature of a head."""
    return shape.kv_width * element_bytes * tokens


def serving_bytes(shape: ModelShape, weight_bytes: float, tokens: float) -> float:
    """What a card must hold: weights, keys and values, and a gigabyte of workspace."""
    return weight_bytes + kv_cache_bytes(shape, tokens) + _WORKSPACE


@dataclass(frozen=True)
class AdapterTraining:
    """How QLoRA trains: adapters on a frozen 4-bit model."""

    rank: int = 8
    tokens: int = 1024
    """of a micro-batch"""
    all_linear: bool = False
    """adapters on every linear layer; else on those of attention and the last of the block, of a
    mixture those outside of experts"""
    num_features: int | None = None
    """input and output features of all layers with an adapter, where others are chosen"""
    adapter_bytes: float = _ADAPTER_BYTES
    """of an adapter's weight: 12 in bf16, 16 in float32, with gradient and two moments"""
    recompute_share: float = 1.0
    """of the blocks, those computed again in the backward pass"""
    recompute: Recompute = "whole"
    """what of them"""


def adapter_memory(shape: ModelShape, setup: AdapterTraining) -> dict[str, float]:
    """Bytes of QLoRA on one card, by component.

    Dettmers et al. 2023 (arXiv 2305.14314), section 3: NF4 with double quantisation takes 4.127
    bits a weight; blocks are recomputed, so that each keeps its input; one layer at a time is
    turned into bf16 for its products.

    Args:
        shape: of the frozen model.
        setup: of the adapters.

    Raises:
        InputError: see `shapes.kept_bytes`.
    """
    layers = shape.layers
    outside = [group for group in shape.groups if group.num == 1]
    few = outside if shape.has_experts else [*outside[:-2], outside[-1]]
    chosen = layers if setup.all_linear else [layer for group in few for layer in group.layers]
    features = setup.num_features
    if features is None:
        features = shape.num_blocks * sum(rows + columns for rows, columns in chosen)
    rest = shape.num_parameters - shape.linear_parameters
    kept = sum(kept_bytes(shape, 2, setup.recompute_share, False, setup.recompute))
    largest = max(rows * columns for rows, columns in layers)
    return {
        "weights": shape.linear_parameters * (4 + _NF4_OVERHEAD_BITS) / 8 + 2.0 * rest,
        "adapters": setup.adapter_bytes * setup.rank * features,
        "activations": setup.tokens * kept,
        "logits": 10.0 * setup.tokens * shape.vocab_size,  # bf16, float32, its gradient
        "one layer in bf16": 2.0 * largest,
        "runtime": _WORKSPACE,
    }
