"""GPTQ on one segment of columns at a time, fast on every device.

Here is all of GPTQ that goes through columns one after another. In PyTorch a column takes some ten
operations: CPUs run that, and float64, and grids without a `rounding` (every scheme here has one).
On a GPU a segment takes one kernel of `sparsify.kernels._gptq_triton`. Its answers differ by the
last bits of sums: of two levels as near, or two scales as good, it may take the other one.

Shape suffixes: O output features (rows), B columns of one segment. Of a stack of weights all
tensors have a leading dimension, and it takes as many launches as one weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsify.kernels import _gptq_triton
from sparsify.kernels.rounding import Rounding, Segment
from sparsify.quantization.schemes import Grid

_MAX_COLUMNS = 128  # of a segment that one kernel can take


def kernel_rounding(values: Tensor, grid: Grid) -> Rounding | None:
    """The grid's rounding where kernels take it, that is float32 on a GPU; else None."""
    return grid.rounding if values.is_cuda and values.dtype == torch.float32 else None


def segment_width(values: Tensor, grid: Grid, block_size: int) -> int:
    """Most columns of a segment; blocks of more than 128 columns are cut for a kernel."""
    has_kernel = kernel_rounding(values, grid) is not None
    return min(block_size, _MAX_COLUMNS) if has_kernel else block_size


def eliminate_(segment: Segment, grid: Grid) -> Tensor:
    """Round columns from the left, each error pushed into the columns right of it.

    The error of column j is (w_j - q_j) / U_jj; column k receives -error U_jk. A pruned column has
    the single level 0.

    Args:
        segment: the weights as they are when the pass reaches them, and U.
        grid: of the levels.

    Returns:
        The errors (O, B), for the columns behind the segment.

    Raises:
        InputError: on a GPU, and Triton is not installed.

    Reference: GPTQ (arXiv:2210.17323), Algorithm 1, the inner loop.

    Cost: O B^2 operations; one kernel on a GPU, else eight operations a column and those of
    the grid.
    """
    rounding = kernel_rounding(segment.values_OB, grid)
    if rounding is not None:
        return _gptq_triton.eliminate_(segment, rounding)
    work_BO, upper_BB, scales_O = segment.values_OB.mT, segment.matrix_BB, segment.scales_O
    error_BO = torch.empty_like(work_BO)
    nearest, zero = grid.rounder(scales_O, segment.zeros_O), work_BO.new_zeros(())
    columns = _columns(work_BO, segment.levels_OB.mT, segment.keep_OB.mT, error_BO)
    pivots = _pivots(upper_BB)
    for column, (weight_O, levels_O, keep_O, error_O) in enumerate(columns):
        torch.where(keep_O, nearest(weight_O), zero, out=levels_O)
        torch.mul(levels_O, scales_O, out=error_O)
        torch.sub(weight_O, error_O, out=error_O).div_(pivots[column])
        _push_right_(work_BO, upper_BB, column, error_O)
    return error_BO.mT


def descend_(segment: Segment, grid: Grid, refits: bool = False) -> Tensor:
    """Give each column its best level in turn, in place, all other columns as they are.

    The best value of column j is q_j + R_j / H_jj, R the residual (W - Q) H.

    Args:
        segment: the residual, the levels to improve, and H.
        grid: of the levels.
        refits: True first moves the scales in place, as `quantization.descent` says; of a
            segment that is a whole group, and for kernels alone.

    Returns:
        The change of Q (O, B).

    Raises:
        InputError: on a GPU, and Triton is not installed.

    Cost: O B^2 operations; one kernel on a GPU, else nine operations a column and those of
    the grid.
    """
    rounding = kernel_rounding(segment.values_OB, grid)
    if rounding is not None:
        return _gptq_triton.descend_(segment, rounding, refits)
    assert not refits, "only a kernel refits scales"
    residual_BO, levels_BO, keep_BO = (
        part.mT.contiguous() for part in (segment.values_OB, segment.levels_OB, segment.keep_OB)
    )
    damped_BB, scales_O = segment.matrix_BB, segment.scales_O
    new_BO, step_BO = torch.empty_like(levels_BO), torch.empty_like(levels_BO)
    nearest, zero = grid.rounder(scales_O, segment.zeros_O), levels_BO.new_zeros(())
    best_BO = levels_BO * scales_O.unsqueeze(-2)
    columns = _columns(levels_BO, best_BO, residual_BO, keep_BO, new_BO, step_BO)
    pivots = _pivots(damped_BB)
    for column, (now_O, best_O, residual_O, keep_O, new_O, step_O) in enumerate(columns):
        best_O += residual_O / pivots[column]
        torch.where(keep_O, nearest(best_O), zero, out=new_O)
        torch.sub(new_O, now_O, out=step_O).mul_(scales_O)
        _push_right_(residual_BO, damped_BB, column, step_O)
    segment.levels_OB.copy_(new_BO.mT)
    return step_BO.mT


def _columns(*tensors_BO: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' columns, side by side."""
    return zip(*(tensor_BO.unbind(-2) for tensor_BO in tensors_BO), strict=True)


def _pivots(matrix_BB: Tensor) -> tuple[Tensor, ...]:
    """What each column is divided by: a number, or (E, 1) of a stack."""
    pivots_B = matrix_BB.diagonal(dim1=-2, dim2=-1)
    return (pivots_B if pivots_B.ndim == 1 else pivots_B.unsqueeze(-2)).unbind(-1)


def _push_right_(work_BO: Tensor, matrix_BB: Tensor, column: int, error_O: Tensor) -> None:
    """Take a column's error out of those right of it, along a row of the matrix."""
    later_BO, row_B = work_BO[..., column + 1 :, :], matrix_BB[..., column, column + 1 :]
    if work_BO.ndim == 2:
        later_BO.addr_(row_B, error_O, alpha=-1)
    else:
        later_BO.baddbmm_(row_B.unsqueeze(-1), error_O.unsqueeze(-2), alpha=-1)
