"""SparseGPT: prune column by column and let the columns to the right make up for the error.

Shape suffixes: O output features (rows), I input features (columns).
"""

from __future__ import annotations

from sparsify.errors import InputError
from sparsify.kernels.sweep import sweep
from sparsify.methods._base import (
    Method,
    Problem,
    PruneParams,
    Solution,
    check_problem,
    working_weight,
)
from sparsify.pattern import Pattern


def solve(problem: Problem, pattern: Pattern, params: PruneParams) -> Solution:
    """Choose the mask and adjust the kept weights in one sweep over the columns.

    Args:
        problem: the weight, the moments, and the allowed mask if there is one; or a stack. What is
            not allowed is pruned and compensated for; with a fixed mask the sweep only compensates.
        pattern: see `kernels.sweep.sweep`.
        params: damping and block_size.

    Returns:
        `Solution`; columns whose input was always zero come back as zeros.

    Raises:
        InputError: see `check_problem`; or m does not divide block_size.
        NonFiniteError: the weight or the Hessian holds NaN or infinity.
        SingularHessianError: see `hessian.inverse_factor`.

    Reference: SparseGPT (arXiv:2301.00774), Algorithm 1 with U = Cholesky(H^-1)^T. Deviations: H
    is a plain mean without the factor 2 (no effect); unstructured masks are chosen per row rather
    than per block of rows, so that rows stay independent; of equal scores the left one survives.

    Cost: that of `kernels.sweep.sweep`, and 2/3 I^3 if the moments have no factor yet.
    """
    check_problem(problem, pattern)
    check_block_size(params.block_size, pattern)
    work_OI = working_weight(problem.weight_OI, problem.name)
    factor = problem.factor(params.damping)
    work_OI.masked_fill_(factor.dead_columns.unsqueeze(-2), 0.0)
    upper_II = factor.upper_II.to(work_OI.dtype)
    pruned_OI, keep_OI = sweep(
        work_OI, upper_II, pattern, params.block_size, problem.allowed_OI, problem.is_mask_fixed
    )
    pruned_OI = pruned_OI.to(problem.weight_OI.dtype)
    return Solution(pruned_OI, keep_OI, factor.damping, factor.dead_columns.sum(-1))


def check_block_size(block_size: int, pattern: Pattern) -> None:
    """Refuse blocks that would cut a group in two."""
    if pattern.is_structured and block_size % pattern.m:
        raise InputError(
            f"prune.block_size={block_size}: must be a multiple of {pattern.m} for pattern "
            f"{pattern}; use for example {max(block_size // pattern.m, 1) * pattern.m}"
        )


METHOD = Method(
    name="sparsegpt",
    summary="choose and adjust column by column from second-order statistics",
    needs_hessian=True,
    needs_factor=True,
    takes_stacks=True,
    solve=solve,
)
