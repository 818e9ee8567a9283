"""twofour: aim at the dense model's output, search the mask by ADMM, refit what it keeps.

The three steps each remove another part of SparseGPT's damage: the target makes up for what
earlier pruning did to the input, the search finds the better mask, the refit the best weights on
it. Measured at 2:4 with 128 rows of 256 calibration tokens, all layers of a block calibrated in
one pass, as the share of SparseGPT's excess log-perplexity on held-out text that is left (dense
perplexity and SparseGPT's behind the model's name):

    model                       resolve  descent  admm  teacher  twofour
    embedded (4.49, 9.55)         0.81     0.80   0.74    0.71     0.68
    stories260k (4.61, 30.9)      0.91     0.84   0.84    0.71     0.67
    1.6 M, books (34.5, 47.0)     0.85     0.84   0.77    0.76     0.69

Other calibration rows moved the last column by up to 0.09. Following the dense model, a share of
0.5 was better than 1.0 (0.76, 0.79 and 0.78), because the layers of a block are measured together
and would all make up for the same error. 30 iterations of ADMM left 0.2 % more layer error than
60; a sweep of group descent behind them took at most 0.6 % away and is left out. On one CPU core
the whole run took 2.0, 1.8 and 2.0 times as long as SparseGPT's, most of it for the second model's
forwards.
"""

from __future__ import annotations

from sparsify.methods._base import Method, Problem, PruneParams, Solution, check_problem
from sparsify.methods.admm import search_and_refit
from sparsify.pattern import Pattern
from sparsify.refit import damped_hessian
from sparsify.targets import teacher_target


def solve(problem: Problem, pattern: Pattern, params: PruneParams) -> Solution:
    """Find the teacher target T, the mask by ADMM on T, the kept weights by refit to T.

    Args:
        problem: the weight, statistics with `cross_II`, `residual_OI` where the layer writes to
            the residual stream, and the allowed mask if there is one.
        pattern: any.
        params: damping, admm_iterations, refit_iterations, teacher_share, residual_share.

    Raises:
        InputError, NonFiniteError, SingularHessianError: see `targets.teacher_target`.

    Reference: `targets.teacher_target`, then `admm.search_and_refit`.

    Cost: (2 admm_iterations + refit_iterations + 8) products of (O, I) with (I, I).
    """
    check_problem(problem, pattern)
    assert problem.statistics is not None, f"{problem.name}: this method needs calibration"
    factor = problem.statistics.factor(params.damping, problem.name)
    target_OI = teacher_target(problem, params)
    damped_II = damped_hessian(problem.hessian_II, factor.damping, target_OI.dtype)
    pruned_OI, keep_OI = search_and_refit(target_OI, damped_II, problem, pattern, params)
    num_dead = int(factor.dead_columns.sum())
    return Solution(pruned_OI.to(problem.weight_OI.dtype), keep_OI, factor.damping, num_dead)


METHOD = Method(
    name="twofour",
    summary="the strongest here: the dense model's output as target, ADMM, least-squares solve",
    needs_hessian=True,
    needs_factor=True,
    needs_teacher=True,
    order="layer",
    solve=solve,
)
