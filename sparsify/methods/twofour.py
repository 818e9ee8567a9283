"""twofour: aim at the dense model's output, search the mask by ADMM, refit what it keeps.

The three steps each remove another part of SparseGPT's damage: the target makes up for what
earlier pruning did to the input, the search finds the better mask, the refit the best weights on
it. What each is worth on three models is in docs/benchmarks/quality.md; the prune stage also has
the model rotated before (`sparsify.rotation.rotate`), which removes 15 to 34 % of what is left.

The choices were made on held-out perplexity, as the share of SparseGPT's excess log-perplexity that
is left, without rotations, on 128 rows of 256 calibration tokens from the first few documents:

    measured input and share a = b     embedded   stories260k   1.8 M, books
    all layers of a block at once, 0.5     0.66          0.67           0.69
    all layers of a block at once, 1       0.76          0.79           0.78
    one layer after another, 0.5           0.59          0.55
    one layer after another, 1             0.57          0.56           0.58

At once, the layers of a block would all make up for the same error; one after another, each
makes up for what is left. A sweep of group descent after ADMM took at most 0.6 % of the error away
and is left out.

The schedule of ADMM was chosen on rows from all over the text (share of the excess left without
rotations; embedded, mean of three seeds; stories260k and books, of two; seconds of solving on
books; error of layers with 8 columns, whose best mask is known, over the best, three of them):

    penalty from, growth, iterations, refit
    0.1, 1.5, 20, 10                   0.53 0.56 0.61   1.15   1.11 to 1.16
    0.1, 1.5, 20, one CG step each     0.76 0.69 0.94   0.84
    0.3, 1.8, 15, one CG step each     0.56 0.58 0.65   0.71
    0.3, 1.8, 10, 10 (the default)     0.54 0.57 0.60   0.69   1.14 to 1.31
    0.3, 1.8, 10, 6                    0.54 0.57 0.60   0.70
    0.5, 1.8, 7, 6                     0.55 0.57 0.62   0.53
    0.1, 1.8 every second, 10, 6       0.62 0.62 0.74   0.62   1.18 to 1.26

What layers lose is a poor judge of what the model loses: a search that starts from a large penalty,
near the mask of the largest weights, loses a little on layers and nothing on perplexity.
"""

from __future__ import annotations

from sparsify.methods._base import Method, Problem, PruneParams, Solution, check_problem
from sparsify.methods._refit import damped_hessian
from sparsify.methods._target import teacher_target
from sparsify.methods.admm import search_and_refit
from sparsify.pattern import Pattern


def solve(problem: Problem, pattern: Pattern, params: PruneParams) -> Solution:
    """Find the teacher target T, the mask by ADMM on T, the kept weights by refit to T.

    Args:
        problem: the weight, `wanted_OI` or moments with `cross_II`, and the allowed mask if
            there is one.
        pattern: any.
        params: damping, admm_iterations, search_precision, refit_iterations, teacher_share,
            residual_share.

    Raises:
        InputError, NonFiniteError, SingularHessianError: see `_target.teacher_target`.

    Reference: `_target.teacher_target`, then `admm.search_and_refit`.

    Cost: (2 admm_iterations + refit_iterations + 7) products of (O, I) with (I, I), on a GPU one
    fewer.
    """
    check_problem(problem, pattern)
    factor = problem.factor(params.damping)
    target_OI = teacher_target(problem, params)
    damped_II = damped_hessian(problem.hessian_II, factor.damping, target_OI.dtype)
    pruned_OI, keep_OI = search_and_refit(target_OI, damped_II, problem, pattern, params)
    num_dead = factor.dead_columns.sum(-1)
    return Solution(pruned_OI.to(problem.weight_OI.dtype), keep_OI, factor.damping, num_dead)


METHOD = Method(
    name="twofour",
    summary="the strongest here: the dense model's output as target, ADMM, least-squares solve",
    needs_hessian=True,
    needs_factor=True,
    needs_teacher=True,
    order="layer",
    takes_stacks=True,
    solve=solve,
)
