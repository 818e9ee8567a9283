"""SparseGPT's mask and sweep, then a least-squares solve of what the mask keeps.

SparseGPT adjusts a column once, from what lies to its left. Re-solving all kept weights of a row
at once takes the rest of the error that this mask can lose.
"""

from __future__ import annotations

from torch import Tensor

from sparsify.kernels.sweep import sweep
from sparsify.methods._base import (
    Method,
    Problem,
    PruneParams,
    Solution,
    check_problem,
    working_weight,
)
from sparsify.methods._refit import damped_hessian, refit
from sparsify.methods.sparsegpt import check_block_size
from sparsify.pattern import Pattern


def solve(problem: Problem, pattern: Pattern, params: PruneParams) -> Solution:
    """Choose the mask as SparseGPT does, then refit the kept weights to the dense output.

    Minimises f(Z) = tr (Z - W) H_l (Z - W)^T over the weights on the mask, from the sweep's Z.

    Args:
        problem: the weight, the moments, and the allowed mask if there is one.
        pattern: any; see `kernels.sweep.sweep`.
        params: damping, block_size, refit_iterations.

    Raises:
        InputError, NonFiniteError, SingularHessianError: see `sparsegpt.solve`.

    Reference: SparseGPT (arXiv:2301.00774), then `_refit.refit`.

    Cost: that of SparseGPT and refit_iterations + 2 products of (O, I) with (I, I).
    """
    check_problem(problem, pattern)
    return sweep_and_refit(
        problem, working_weight(problem.weight_OI, problem.name), pattern, params
    )


def sweep_and_refit(
    problem: Problem, target_OI: Tensor, pattern: Pattern, params: PruneParams
) -> Solution:
    """SparseGPT's sweep from the target, then the refit to the target; see `solve`.

    Args:
        target_OI: T, what the pruned weight stands in for, float32 or float64; changed in dead
            columns, which become zero.
    """
    check_block_size(params.block_size, pattern)
    factor = problem.factor(params.damping)
    target_OI.masked_fill_(factor.dead_columns.unsqueeze(-2), 0.0)
    upper_II = factor.upper_II.to(target_OI.dtype)
    swept_OI, keep_OI = sweep(
        target_OI, upper_II, pattern, params.block_size, problem.allowed_OI, problem.is_mask_fixed
    )
    damped_II = damped_hessian(problem.hessian_II, factor.damping, target_OI.dtype)
    pruned_OI = refit(swept_OI, target_OI, keep_OI, damped_II, params.refit_iterations)
    num_dead = factor.dead_columns.sum(-1)
    return Solution(pruned_OI.to(problem.weight_OI.dtype), keep_OI, factor.damping, num_dead)


METHOD = Method(
    name="sparsegpt_refit",
    summary="SparseGPT, then a least-squares solve of the kept weights",
    needs_hessian=True,
    needs_factor=True,
    takes_stacks=True,
    solve=solve,
)
