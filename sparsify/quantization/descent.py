"""Coordinate descent on a rounded weight: scales and levels in turn, none of which does harm.

Shape suffixes: O output features (rows), I input features (columns), G groups of columns, B columns
of one segment. Of a stack of weights all tensors have a leading dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.kernels.precision import add_product_
from sparsify.kernels.rounding import Segment
from sparsify.quantization.codes import per_column
from sparsify.quantization.levels import Levels, Problem
from sparsify.quantization.scales import groups
from sparsify.quantization.segments import descend_, kernel_rounding, segment_width


def refine_(levels: Levels, problem: Problem) -> None:
    """Lower tr((W - Q) H (W - Q)^T) in place, from the elimination's answer.

    With R = (W - Q) H, the best value of one weight, all others fixed, is q_j + R_j / H_jj, and
    the nearest level to it is the best one. In each sweep every group first refits its scale and
    then, column by column, its levels. No step raises the objective of a row. Ends early when a
    sweep changes nothing.

    Of a stack each weight has an answer of its own: one that has come to rest stays as it is while
    others change.

    Cost: O I^2 a sweep.
    """
    params, damped_II = problem.params, problem.damped_II
    levels_OI, scales_OG = levels.levels_OI, levels.scales_OG
    num_columns = levels_OI.shape[-1]
    scales_OI = per_column(scales_OG, problem.group_size, num_columns)
    residual_OI = (problem.target_OI - levels_OI * scales_OI) @ damped_II
    del scales_OI  # as large as the weight, and the sweeps are where most memory is in use
    for _ in range(params.num_refine_sweeps):
        if not _sweep_(levels, problem, residual_OI):
            return


def _sweep_(levels: Levels, problem: Problem, residual_OI: Tensor) -> bool:
    """Every group once, in place; whether anything changed."""
    levels_OI, scales_OG = levels.levels_OI, levels.scales_OG
    before_OI, before_OG = levels_OI.clone(), scales_OG.clone()
    for group, (start, stop) in enumerate(groups(levels_OI.shape[-1], problem.group_size)):
        _sweep_group_(levels, problem, residual_OI, group, slice(start, stop))
    return not (torch.equal(before_OI, levels_OI) and torch.equal(before_OG, scales_OG))


def _sweep_group_(
    levels: Levels, problem: Problem, residual_OI: Tensor, group: int, part: slice
) -> None:
    """One group's scale, then its levels; the residual follows."""
    levels_OI, scales_O = levels.levels_OI, levels.scales_OG[..., group]
    damped_II = problem.damped_II
    grid, num_columns = problem.grid, part.stop - part.start
    width = segment_width(levels_OI, grid, problem.params.block_size)
    # A kernel that holds the whole group refits its scale as well.
    refits = num_columns <= width and kernel_rounding(levels_OI, grid) is not None
    if not refits:
        levels_OB = levels_OI[..., part]
        step_O = _scale_step(
            levels_OB, scales_O, residual_OI[..., part], damped_II[..., part, part], problem
        )
        scales_O += step_O
        moved_OB = levels_OB * step_O.unsqueeze(-1)
        add_product_(residual_OI, moved_OB, damped_II[..., part, :], alpha=-1)
    for left, right in groups(num_columns, width):
        block = slice(part.start + left, part.start + right)
        segment = Segment(
            residual_OI[..., block], levels_OI[..., block], problem.keep_OI[..., block],
            damped_II[..., block, block], scales_O, levels.zeros_of(group),
        )  # fmt: skip
        change_OB = descend_(segment, grid, refits)
        add_product_(residual_OI, change_OB, damped_II[..., block, :], alpha=-1)


def _scale_step(
    levels_OB: Tensor, scales_O: Tensor, residual_OB: Tensor, damped_BB: Tensor, problem: Problem
) -> Tensor:
    """How far the scale of each row of a group should move, all levels fixed.

    The least-squares scale is s + R c / (c H c^T); the move is 0 where that scale, rounded as it
    is stored, is no better than the present one.
    """
    gain_O = (residual_OB * levels_OB).sum(-1)
    curvature_O = ((levels_OB @ damped_BB) * levels_OB).sum(-1)
    wanted_O = scales_O + gain_O / torch.where(curvature_O == 0, math.inf, curvature_O)
    # Clamped so that a refit scale never overflows what it is stored in.
    largest = torch.finfo(problem.grid.scale_dtype).max
    step_O = problem.grid.rounded(wanted_O.clamp(-largest, largest)) - scales_O
    # A step t lowers the objective by 2 t gain - t^2 curvature.
    return torch.where(step_O * (2 * gain_O - step_O * curvature_O) > 0, step_O, 0.0)
