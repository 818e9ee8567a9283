"""What a one-shot method is: parameters and statistics in, pruned weight and keep mask out.

Shape suffixes: O output features (rows), I input features (columns).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.errors import InputError, NonFiniteError
from sparsify.pattern import Pattern


@dataclass
class PruneParams:
    """Numbers that methods share; a method ignores what its mathematics does not have."""

    damping: float = 0.01
    """share of the mean Hessian diagonal added to the diagonal; 0 or more"""
    block_size: int = 128
    """columns whose updates are gathered before they reach the columns to the right"""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise InputError(f"damping={self.damping}: must be a finite number, 0 or more")
        if self.block_size < 1:
            raise InputError(f"block_size={self.block_size}: must be at least 1")


@dataclass
class Solution:
    """A pruned layer (or some rows of it)."""

    weight_OI: Tensor
    """dtype of the given weight; exactly 0.0 wherever the mask is False"""
    keep_mask_OI: Tensor
    """bool, True = survives; the authority, because a kept weight may be 0.0 too"""
    damping: float | None
    """damping that was used; None when the method uses none"""
    num_dead_columns: int
    """input columns that were zero on every calibration token, as far as the method looks"""


Solve = Callable[[Tensor, Tensor | None, Pattern, PruneParams, str], Solution]
"""(weight_OI, hessian_II or None, pattern, params, layer name) -> Solution; rows independent."""


@dataclass(frozen=True)
class Method:
    """A one-shot pruning method: what a module of this package exports as METHOD."""

    name: str
    summary: str
    """one line for help and reports"""
    needs_hessian: bool
    """False: `solve` accepts None for the Hessian"""
    solve: Solve


def working_weight(weight_OI: Tensor, name: str) -> Tensor:
    """A copy of the weight in the precision that methods compute in: float32, float64 if given.

    Raises:
        NonFiniteError: the weight holds NaN or infinity; the message names the layer.
    """
    if not bool(torch.isfinite(weight_OI).all()):
        raise NonFiniteError(f"{name}: the weight holds NaN or infinity; check the checkpoint")
    return weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32), copy=True)


def selected(weight_OI: Tensor, keep_mask_OI: Tensor) -> Solution:
    """The solution of a method that only chooses: kept weights stay as they are."""
    pruned = weight_OI.detach().masked_fill(~keep_mask_OI, 0.0)
    return Solution(pruned, keep_mask_OI, damping=None, num_dead_columns=0)
