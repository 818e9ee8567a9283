"""SparseGPT: prune column by column and let the columns to the right make up for the error.

Shape suffixes: O output features (rows), I input features (columns), B columns of one block,
G columns of one step within the block. A transposed block (B, O) keeps every column of the weight
contiguous, which is what the sweep reads and writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.hessian import inverse_factor
from sparsify.methods._base import Method, PruneParams, Solution, working_weight
from sparsify.pattern import Pattern, check_divides, keep_highest, keep_top

_STEP = 8  # columns per step for unstructured patterns, where the mask does not prescribe one


def solve(
    weight_OI: Tensor,
    hessian_II: Tensor | None,
    pattern: Pattern,
    params: PruneParams,
    name: str,
) -> Solution:
    """Choose the mask and adjust the kept weights in one sweep over the columns.

    Columns are visited from left to right. At the first column of each group of m, the group's
    mask is chosen from the weights as adjusted so far, keeping the n largest w^2 / U_jj^2. A
    pruned weight w_j leaves the error e = w_j / U_jj, and every later column k receives
    -e U_jk, the optimal compensation given the columns already fixed.

    Args:
        weight_OI: (O, I), any float dtype; rows are independent of each other.
        hessian_II: (I, I) mean of x x^T over the calibration tokens.
        pattern: for unstructured, each block of `block_size` columns gets its mask at once and
            each row of it a quota; quotas are cumulative, so that a row's total is exact.
        params: damping and block_size. With N:M the result does not depend on block_size but for
            rounding; block_size must be a multiple of m.
        name: layer, for messages.

    Returns:
        `Solution`; columns whose input was always zero come back as zeros.

    Raises:
        InputError: m does not divide I or block_size.
        NonFiniteError: the weight or the Hessian holds NaN or infinity.
        SingularHessianError: see `hessian.inverse_factor`.

    Reference: SparseGPT (arXiv:2301.00774), Algorithm 1 with U = Cholesky(H^-1)^T. Deviations: H
    is a plain mean without the factor 2 (no effect); unstructured masks are chosen per row rather
    than per block of rows, so that rows stay independent; of equal scores the left one survives.

    Cost: 2/3 I^3 for the factor and O I^2 for the sweep, of which I^2 / block_size O is GEMM
    between blocks; float32 copies of the weight and three (I, I) matrices.
    """
    assert hessian_II is not None, "SparseGPT needs the Hessian"
    num_columns = weight_OI.shape[1]
    check_divides(name, num_columns, pattern)
    _check_block_size(params.block_size, pattern)
    work_OI = working_weight(weight_OI, name)
    factor = inverse_factor(hessian_II, params.damping, name)
    upper_II = factor.upper_II.to(work_OI.dtype)
    work_OI[:, factor.dead_columns] = 0.0
    keep_OI = torch.empty_like(work_OI, dtype=torch.bool)
    for start in range(0, num_columns, params.block_size):
        stop = min(start + params.block_size, num_columns)
        block_BO = work_OI[:, start:stop].T.contiguous()
        upper_BB = upper_II[start:stop, start:stop]
        quota = pattern.num_kept(stop) - pattern.num_kept(start)
        keep_BO, error_BO = _sweep_block(block_BO, upper_BB, pattern, quota)
        work_OI[:, start:stop] = block_BO.T
        keep_OI[:, start:stop] = keep_BO.T
        work_OI[:, stop:].addmm_(error_BO.T, upper_II[start:stop, stop:], alpha=-1)
    pruned_OI = work_OI.masked_fill_(~keep_OI, 0.0).to(weight_OI.dtype)
    return Solution(pruned_OI, keep_OI, factor.damping, int(factor.dead_columns.sum()))


def _check_block_size(block_size: int, pattern: Pattern) -> None:
    """Refuse blocks that would cut a group in two."""
    if pattern.is_structured and block_size % pattern.m:
        raise InputError(
            f"prune.block_size={block_size}: must be a multiple of {pattern.m} for pattern "
            f"{pattern}; use for example {max(block_size // pattern.m, 1) * pattern.m}"
        )


def _sweep_block(
    block_BO: Tensor, upper_BB: Tensor, pattern: Pattern, quota: int
) -> tuple[Tensor, Tensor]:
    """Prune one block of columns in place; return its keep mask and errors, both (B, O).

    Within a step of G columns the errors follow one from another; the columns of the block to the
    right of the step receive all G updates as one small product, which is the lazy update of the
    paper on a second level.
    """
    num_columns = len(block_BO)
    error_BO = torch.zeros_like(block_BO)
    diagonal_B1 = upper_BB.diagonal().unsqueeze(1)
    if pattern.is_structured:
        keep_BO = torch.empty_like(block_BO, dtype=torch.bool)
    else:
        scores_BO = (block_BO / diagonal_B1).abs_()
        keep_BO = keep_top(scores_BO.T, quota).T
    step = pattern.m or _STEP
    for left in range(0, num_columns, step):
        right = min(left + step, num_columns)
        if pattern.is_structured:
            scores_GO = (block_BO[left:right] / diagonal_B1[left:right]).abs_()
            torch.stack(keep_highest(scores_GO.unbind(0), pattern.n), out=keep_BO[left:right])
        for column in range(left, right):
            error_O = block_BO[column] / upper_BB[column, column]
            error_O.masked_fill_(keep_BO[column], 0.0)
            error_BO[column] = error_O
            rest = slice(column + 1, right)
            block_BO[rest].addr_(upper_BB[column, rest], error_O, alpha=-1)
        block_BO[right:].addmm_(upper_BB[left:right, right:].T, error_BO[left:right], alpha=-1)
    return keep_BO, error_BO


METHOD = Method(
    name="sparsegpt",
    summary="choose and adjust column by column from second-order statistics; the strongest here",
    needs_hessian=True,
    solve=solve,
)
