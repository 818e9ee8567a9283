"""What pruning reports of each layer.

Shape suffixes: O output features (rows of a weight), I input features, R rows of one part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PHASES = ("load", "statistics", "reduce", "factor", "solve", "gather", "forward", "write")
"""Parts of the time of a layer, in the order in which they happen."""

FEW_TOKENS = 20.0
"""Tokens per input column under which statistics hold too much noise to be trusted. On a small
Llama, fitting layers to the dense model's outputs helped held-out KL at 32 tokens per column and
did harm at 8."""

_LARGE_SHARE = 0.01

_NUM_NAMED = 3


@dataclass
class LayerReport:
    """What pruning did to one layer."""

    name: str
    """full dotted name, without ".weight\""""
    block: int
    """index of the decoder block"""
    shape: tuple[int, int]
    """(output features, input features)"""
    num_tokens: int
    """calibration tokens in the Hessian"""
    tokens_per_column: float
    """the same for each input column; below about ten, the Hessian is mostly noise"""
    error: float
    """tr((W - Z) H (W - Z)^T): mean square output error per calibration token, summed over rows"""
    relative_error: float
    """error / tr(W H W^T); 0 when the layer's output was zero anyway"""
    sparsity: float
    """share of the weights that were pruned"""
    damping: float | None
    """damping that was used; larger than asked for when the Hessian needed it; None: no damping"""
    num_dead_columns: int
    """input columns that were zero on every calibration token"""
    condition: float | None
    """estimate of the damped Hessian's condition number; None where no factor was computed"""
    large_kept: float
    """share of the largest hundredth of each row, by absolute value, that survived"""
    keep_mask_sha256: str
    """of the layer's mask, see `masks.mask_digest`"""
    rounding_error: float | None = None
    """what of the error came with quantising the pruned weights Z in the same walk:
    tr((Z - Q) H (Z - Q)^T); None without"""
    num_lent: int = 0
    """of an expert that too few tokens reach: tokens that its Hessian was lent by the others, see
    `calibration.routed.Lenders`; not in `num_tokens`"""
    seconds: dict[str, float] = field(default_factory=dict)
    """time by phase; what was done for the block as a whole is divided over its layers"""

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> LayerReport:
        """From plain values, as JSON has them."""
        return cls(**{**value, "shape": tuple(value["shape"])})


def large_kept(dense_RI: Tensor, keep_mask_RI: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's largest weights survived, and how many there are; float64 scalars.

    Args:
        dense_RI: rows of a weight before pruning.
        keep_mask_RI: bool, True = survives.
    """
    count = max(1, math.ceil(_LARGE_SHARE * dense_RI.shape[1]))
    largest = dense_RI.abs().float().topk(count, dim=1).indices
    kept = keep_mask_RI.gather(1, largest).sum(dtype=torch.float64)
    return kept, kept.new_tensor(largest.numel())


def lent_remark(layers: Sequence[LayerReport]) -> str | None:
    """Which experts' Hessians were partly lent, in a sentence; None: none."""
    lent = [layer for layer in layers if layer.num_lent]
    if not lent:
        return None
    names = ", ".join(f"{layer.name} ({layer.num_tokens})" for layer in lent[:_NUM_NAMED])
    more = f" and {len(lent) - _NUM_NAMED} more" if len(lent) > _NUM_NAMED else ""
    return (
        f"{len(lent)} of {len(layers)} layers are in experts that fewer calibration tokens reach "
        f"than the layer has input columns: {names}{more}; what is missing is made up from the "
        "tokens of all experts, and in layers that read inside of an expert by the size of weights "
        "(num_lent in the record); raise prune.num_samples or data.sequence_length"
    )
