"""Cholesky factors and their inverses, in place, by one process or by all of them together.

Shape suffixes: I rows and columns of the matrix, K columns of a panel or slice, R rows below it, E
matrices of a stack.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sparsify.comm import Comm

_LEAF = 256  # columns of a triangle that is inverted by one solve

_PANEL = 512  # columns that are factored, or sent, at once

_EDGE = 8  # shares of the inverse begin at multiples of it: aligned in memory


def invert_factor_(matrix_II: Tensor) -> bool:
    """Replace a contiguous symmetric matrix by the inverse of its lower Cholesky factor.

    Returns:
        False when the matrix is not positive definite to its precision; it is then spoilt. A pivot
        that lost all but its rounding noise would be a made-up number in the solution, so it counts
        as failed even where it happens to be positive.

    Cost: I^3 / 3 multiplications, and half a matrix of memory besides the given one.
    """
    least_I = _least_squares(matrix_II)
    info = _factor_(matrix_II)
    if int(info) != 0 or bool((matrix_II.diagonal() ** 2 <= least_I).any()):
        return False
    _invert_lower_(matrix_II)
    return True


def invert_factors_(matrix_EII: Tensor) -> Tensor:
    """`invert_factor_` of a stack of matrices, in as many launches as of one.

    Returns:
        bool (E,), False where a matrix is not positive definite to its precision and is spoilt.
    """
    least_EI = _least_squares(matrix_EII)
    info_E = _factor_(matrix_EII)
    is_sound_EI = matrix_EII.diagonal(dim1=-2, dim2=-1) ** 2 > least_EI
    _invert_lower_(matrix_EII)
    return is_sound_EI.all(-1) & (info_E == 0)


def _factor_(matrix_II: Tensor) -> Tensor:
    """Replace a matrix, or each of a stack, by its lower Cholesky factor.

    Returns:
        int32, one for each matrix: not 0 where it is not positive definite.
    """
    info = torch.empty(matrix_II.shape[:-2], dtype=torch.int32, device=matrix_II.device)
    # The factorisation works in place on columns, and rows of the lower are columns of the upper.
    torch.linalg.cholesky_ex(matrix_II.mT, upper=True, out=(matrix_II.mT, info))
    return info


def invert_factor_together_(matrix_II: Tensor, comm: Comm) -> bool:
    """The same by all processes, each with an equal share of the work.

    All of them call it with the same matrix and are left with the same bits and the same answer.
    With a fixed order the work is cut into the same pieces for every number of processes, so that
    bits do not depend on it. They are not those of `invert_factor_`, which adds up in another
    order.

    Args:
        matrix_II: contiguous and symmetric, the same on all processes.
        comm: the processes.

    Returns:
        See `invert_factor_`.

    Cost, on each of P processes: I^3 / (3 P) multiplications, and on the first, for which the
    others wait, K I^2 / 2 more, K being 512. Every number below the diagonal is sent twice. Memory
    besides the matrix: a third of it with two processes, an eighth with eight (or one for which
    the order is fixed), and some panels of I K numbers.
    """
    if not _factor_together_(matrix_II, comm):
        return False
    _invert_together_(matrix_II, comm)
    return True


def _least_squares(matrix_II: Tensor) -> Tensor:
    """(I,): squares of pivots that are all rounding noise; of a stack (E, I)."""
    diagonal_I = matrix_II.diagonal(dim1=-2, dim2=-1)
    return math.sqrt(matrix_II.shape[-1]) * torch.finfo(matrix_II.dtype).eps * diagonal_I


def _factor_together_(matrix_II: Tensor, comm: Comm) -> bool:
    """Replace a matrix by its lower Cholesky factor, panel after panel of columns.

    The rows below a panel's triangle are shared out. What a panel loses to those before it is
    subtracted when its turn comes, since all processes have those by then.
    """
    size = len(matrix_II)
    least_I = _least_squares(matrix_II)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        before_KI = matrix_II[start:stop, :start]
        triangle_KK = matrix_II[start:stop, start:stop].contiguous()
        if comm.rank == 0:
            left_KK = torch.addmm(triangle_KK, before_KI, before_KI.mT, alpha=-1)
            triangle_KK, info = torch.linalg.cholesky_ex(left_KK)
            # What fails spoils all that follows, and is seen at the end: nobody waits before.
            triangle_KK = triangle_KK.masked_fill(info != 0, math.nan).contiguous()
        comm.broadcast_(triangle_KK, 0)
        parts = []
        for lane in comm.lanes(size - stop):
            below_RI = matrix_II[stop:][lane, :stop]
            left_RK = torch.addmm(below_RI[:, start:], below_RI[:, :start], before_KI.mT, alpha=-1)
            parts.append(
                torch.linalg.solve_triangular(triangle_KK.mT, left_RK, upper=True, left=False)
            )
        matrix_II[start:stop, start:stop] = triangle_KK
        matrix_II[stop:, start:stop] = comm.gather_rows(torch.cat(parts), size - stop)()
    matrix_II.tril_()
    return bool((matrix_II.diagonal() ** 2 > least_I).all())


def _invert_together_(lower_II: Tensor, comm: Comm) -> None:
    """Invert a lower triangular matrix, of which each process takes slices of columns."""
    per_process = comm.num_lanes // comm.world_size
    slices = even_slices(len(lower_II), comm.num_lanes)
    for start, stop in slices[comm.rank * per_process : (comm.rank + 1) * per_process]:
        _invert_columns_(lower_II, start, stop)
    if comm.world_size == 1:
        return
    for index, (start, stop) in enumerate(slices):
        for first in range(start, stop, _PANEL):
            columns = slice(first, min(first + _PANEL, stop))
            sent_RK = lower_II[first:, columns].contiguous()
            comm.broadcast_(sent_RK, index // per_process)
            lower_II[first:, columns] = sent_RK


def even_slices(size: int, num_slices: int) -> list[tuple[int, int]]:
    """Slices of columns, from first to last, whose inverses take the same number of operations.

    What is left from column c on takes (size - c)^3 / 6 multiplications, so that the last slice is
    the widest.
    """
    left = [size / _EDGE * (1 - index / num_slices) ** (1 / 3) for index in range(num_slices)]
    edges = [max(0, size - _EDGE * round(value)) for value in left]
    edges[0] = 0
    return list(itertools.pairwise([*edges, size]))


def _invert_lower_(lower_II: Tensor) -> None:
    """Invert a lower triangular matrix in place, or each of a stack.

    Cost: I^3 / 6 multiplications, where solving for the columns of the identity takes I^3 / 2.
    """
    size = lower_II.shape[-1]
    if size <= _LEAF:
        eye_II = torch.eye(size, dtype=lower_II.dtype, device=lower_II.device)
        lower_II.copy_(torch.linalg.solve_triangular(lower_II, eye_II, upper=False))
        return
    half = size // 2
    _invert_columns_(lower_II, 0, half)
    _invert_lower_(lower_II[..., half:, half:])


def _invert_columns_(lower_II: Tensor, start: int, stop: int) -> None:
    """Replace some columns of a lower triangular matrix by those of its inverse.

    The inverse of [[A, 0], [C, D]] is [[1/A, 0], [-1/D C 1/A, 1/D]]. It reads these columns and
    those behind them, which are to be as they were.
    """
    triangle_KK = lower_II[..., start:stop, start:stop]
    below_RK = lower_II[..., stop:, start:stop]
    if below_RK.shape[-2]:
        last_RR = lower_II[..., stop:, stop:]
        solved_RK = torch.linalg.solve_triangular(last_RR, below_RK, upper=False)
        below_RK.copy_(
            torch.linalg.solve_triangular(triangle_KK, solved_RK, upper=False, left=False)
        )
        below_RK.neg_()
    _invert_lower_(triangle_KK)
