"""Coordinate descent on a rounded weight: scales and levels in turn, none of which does harm.

Shape suffixes: O output features (rows), I input features (columns), G groups of columns, B columns
of one segment.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.quantization.codes import per_column
from sparsify.quantization.levels import Levels, Problem
from sparsify.quantization.scales import groups


def refine_(levels: Levels, problem: Problem) -> None:
    """Lower tr((W - Q) H (W - Q)^T) in place, from the elimination's answer.

    With R = (W - Q) H, the best value of one weight, all others fixed, is q_j + R_j / H_jj, and
    the nearest level to it is the best one. In each sweep every group first refits its scale and
    then, column by column, its levels. No step raises the objective of a row. Ends early when a
    sweep changes nothing.

    Cost: O I^2 a sweep.
    """
    params, damped_II = problem.params, problem.damped_II
    levels_OI, scales_OG = levels.levels_OI, levels.scales_OG
    num_columns = levels_OI.shape[1]
    quantized_OI = levels_OI * per_column(scales_OG, problem.group_size, num_columns)
    residual_OI = (problem.target_OI - quantized_OI) @ damped_II
    for _ in range(params.num_refine_sweeps):
        before = levels_OI.clone(), scales_OG.clone()
        for group, (start, stop) in enumerate(groups(num_columns, problem.group_size)):
            part, scales_O = slice(start, stop), scales_OG[:, group]
            levels_OB = levels_OI[:, part]
            step_O = _scale_step(
                levels_OB, scales_O, residual_OI[:, part], damped_II[part, part], problem
            )
            scales_O += step_O
            residual_OI.addmm_(levels_OB * step_O[:, None], damped_II[part], alpha=-1)
            for left, right in groups(stop - start, params.block_size):
                block = slice(start + left, start + right)
                step_OB = _descend_(
                    levels_OI[:, block], scales_O, levels.zeros_of(group), residual_OI[:, block],
                    block, problem,
                )  # fmt: skip
                residual_OI.addmm_(step_OB, damped_II[block], alpha=-1)
        if torch.equal(before[0], levels_OI) and torch.equal(before[1], scales_OG):
            return


def _scale_step(
    levels_OB: Tensor, scales_O: Tensor, residual_OB: Tensor, damped_BB: Tensor, problem: Problem
) -> Tensor:
    """How far the scale of each row of a group should move, all levels fixed.

    The least-squares scale is s + R c / (c H c^T); the move is 0 where that scale, rounded as it
    is stored, is no better than the present one.
    """
    gain_O = (residual_OB * levels_OB).sum(1)
    curvature_O = ((levels_OB @ damped_BB) * levels_OB).sum(1)
    wanted_O = scales_O + gain_O / torch.where(curvature_O == 0, math.inf, curvature_O)
    # Clamped so that a refit scale never overflows what it is stored in.
    largest = torch.finfo(problem.grid.scale_dtype).max
    step_O = problem.grid.rounded(wanted_O.clamp(-largest, largest)) - scales_O
    # A step t lowers the objective by 2 t gain - t^2 curvature.
    return torch.where(step_O * (2 * gain_O - step_O * curvature_O) > 0, step_O, 0.0)


def _descend_(
    levels_OB: Tensor, scales_O: Tensor, zeros_O: Tensor | None, residual_OB: Tensor, block: slice,
    problem: Problem,
) -> Tensor:  # fmt: skip
    """Give each column of a block its best level in turn, in place; returns the change of Q."""
    damped_BB, keep_OB = problem.damped_II[block, block], problem.keep_OI[:, block]
    levels_BO = levels_OB.T.contiguous()
    residual_BO = residual_OB.T.contiguous()
    keep_BO = keep_OB.T.contiguous()
    step_BO = torch.empty_like(levels_BO)
    for column in range(len(levels_BO)):
        now_O = levels_BO[column].clone()
        best_O = now_O * scales_O + residual_BO[column] / damped_BB[column, column]
        new_O = problem.grid.nearest(best_O, scales_O, zeros_O)
        new_O.masked_fill_(~keep_BO[column], 0.0)
        levels_BO[column] = new_O
        step_BO[column] = (new_O - now_O) * scales_O
        rest = slice(column + 1, len(levels_BO))
        residual_BO[rest].addr_(damped_BB[column, rest], step_BO[column], alpha=-1)
    levels_OB.copy_(levels_BO.T)
    return step_BO.T
