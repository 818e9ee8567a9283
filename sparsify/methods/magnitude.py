"""Magnitude pruning: keep the largest weights. The baseline that needs no data."""

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
    """Keep the weights of largest absolute value; nothing is adjusted.

    Args:
        problem: the weight, and the allowed mask if there is one, or a stack; moments are not
            looked at.
        pattern: groups in which weights compete (for unstructured, the row).
        params: not looked at.

    Raises:
        InputError: see `check_problem`.
        NonFiniteError: the weight holds NaN or infinity.

    Reference: Han et al., arXiv:1506.02626, one step, within each group instead of the layer.

    Cost: O(O I m).
    """
    check_problem(problem, pattern)
    scores_OI = working_weight(problem.weight_OI, problem.name).abs_()
    return selected(problem.weight_OI, chosen_mask(scores_OI, problem, pattern))


METHOD = Method(
    name="magnitude",
    summary="keep the largest weights; no data, the weakest baseline",
    needs_hessian=False,
    takes_stacks=True,
    solve=solve,
)
