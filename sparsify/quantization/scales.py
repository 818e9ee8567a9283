"""Scales of groups of columns: the search for the best one.

Shape suffixes: R rows, B columns of one group. Of a stack of weights all tensors have a leading
dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsify.kernels import _gptq_triton
from sparsify.kernels.precision import times
from sparsify.quantization.schemes import Grid
from sparsify.quantization.segments import kernel_rounding


def groups(num_columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """(first, past the last) column of every group; the last one may be short."""
    for start in range(0, num_columns, group_size):
        yield start, min(start + group_size, num_columns)


def search_scales(
    weight_RB: Tensor, keep_RB: Tensor, importance_B: Tensor, grid: Grid, num_steps: int
) -> tuple[Tensor, Tensor | None]:
    """For each row of one group, the scale with the least weighted square error.

    The error of scale s is sum over kept columns j of importance_j (w_j - s level_j)^2 with the
    nearest levels; `Grid.tries` says what is tried.

    Args:
        weight_RB: floating point; what it holds at pruned places is ignored.
        keep_RB: bool, True = survives.
        importance_B: 0 or more.
        grid: of the levels.
        num_steps: see `Grid.tries`.

    Returns:
        (R,) scales as they will be stored, in the weight's dtype; 0 where no kept weight needs
        another. (R,) zeros of an asymmetric grid, else None.

    Raises:
        InputError: on a GPU, and Triton is not installed.

    Cost: B levels for each row and try; one kernel for float32 on a GPU, else some ten operations
    a try.
    """
    rounding = kernel_rounding(weight_RB, grid)
    if rounding is not None:
        tries = tuple(grid.shifted_shares(num_steps))
        return _gptq_triton.search(weight_RB, keep_RB, importance_B, rounding, tries)
    kept_RB = weight_RB.masked_fill(~keep_RB, 0.0)
    scales_R = torch.zeros_like(kept_RB[..., 0])
    best_R = torch.full_like(scales_R, math.inf)
    zeros_R: Tensor | None = None
    for tried_R, tried_zeros_R in grid.tries(kept_RB, num_steps):
        tried_R1 = tried_R.unsqueeze(-1)
        tried_zeros_R1 = None if tried_zeros_R is None else tried_zeros_R.unsqueeze(-1)
        error_RB = grid.nearest(kept_RB, tried_R1, tried_zeros_R1) * tried_R1
        error_R = times(error_RB.sub_(kept_RB).square_(), importance_B)
        better_R = error_R < best_R
        best_R = torch.where(better_R, error_R, best_R)
        scales_R = torch.where(better_R, tried_R, scales_R)
        if tried_zeros_R is not None:
            old_R = tried_zeros_R if zeros_R is None else zeros_R
            zeros_R = torch.where(better_R, tried_zeros_R, old_R)
    return scales_R, zeros_R
