"""Wanda: keep the weights whose size times the size of their input is largest."""

from __future__ import annotations

from sparsify.methods._base import (
    Method,
    Problem,
    PruneParams,
    Solution,
    check_problem,
    chosen_mask,
    selected,
    working_weight,
)
from sparsify.pattern import Pattern


def solve(problem: Problem, pattern: Pattern, params: PruneParams) -> Solution:
    """Keep the weights of largest |W_ij| * rms(x_j); nothing is adjusted.

    Args:
        problem: the weight, the Hessian, of which only the diagonal (the mean square of each
            input) is read, and the allowed mask if there is one; or a stack.
        pattern: groups in which weights compete (for unstructured, the row).
        params: not looked at.

    Raises:
        InputError: see `check_problem`.
        NonFiniteError: the weight holds NaN or infinity.

    Reference: Wanda (arXiv:2306.11695), equation 1. Deviation: the root mean square of an input
    instead of its 2-norm, a common factor of all scores.

    Cost: O(O I m).
    """
    check_problem(problem, pattern)
    mean_square_I = problem.hessian_II.diagonal(dim1=-2, dim2=-1)
    scores_OI = working_weight(problem.weight_OI, problem.name).abs_()
    scores_OI *= mean_square_I.to(scores_OI.dtype).sqrt().unsqueeze(-2)
    solution = selected(problem.weight_OI, chosen_mask(scores_OI, problem, pattern))
    solution.num_dead_columns = (mean_square_I == 0).sum(-1)
    return solution


METHOD = Method(
    name="wanda",
    summary="keep the largest weight x input size; fast, no adjustment of what stays",
    needs_hessian=True,
    takes_stacks=True,
    solve=solve,
)
