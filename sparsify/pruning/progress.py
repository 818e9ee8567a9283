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

_NUM_PANELS = 8  # of the Hessian, where only half of it is multiplied

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


def output_energy(change_RI: Tensor, hessian_II: Tensor) -> Tensor:
    """tr(D H D^T) for rows D, float64: mean square output per token of D; (E,) of a stack.

    H is symmetric, so panels of its rows count twice to the right of the diagonal and not at all to
    the left of it, which is 9/16 of the product.
    """
    change_RI = change_RI.to(hessian_II.dtype)
    num_columns = hessian_II.shape[-1]
    energy = change_RI.new_zeros(change_RI.shape[:-2], dtype=torch.float64)
    width = -(-num_columns // _NUM_PANELS)
    for start in range(0, num_columns, width):
        panel = slice(start, start + width)
        product = change_RI[..., panel] @ hessian_II[..., panel, start:]
        product[..., width:] *= 2
        energy += product.mul_(change_RI[..., start:]).sum((-2, -1), dtype=torch.float64)
    return energy


def large_kept(dense_RI: Tensor, keep_mask_RI: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's largest weights survived, and how many there are; float64 scalars, or
    (E,) of a stack.

    Args:
        dense_RI: rows of a weight before pruning, or of each of a stack (E, R, I).
        keep_mask_RI: bool, True = survives.
    """
    count = max(1, math.ceil(_LARGE_SHARE * dense_RI.shape[-1]))
    largest = dense_RI.abs().float().topk(count, dim=-1).indices
    kept = keep_mask_RI.gather(-1, largest).sum((-2, -1), dtype=torch.float64)
    return kept, torch.full_like(kept, count * dense_RI.shape[-2])


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
