"""SparseGPT and a refit, towards what the dense model computes at this place.

Every other method reproduces the layer's own dense output from inputs that earlier pruning has
already changed. This one aims at the dense model's output, so that errors are made up for as the
walk proceeds instead of adding up.
"""

from __future__ import annotations

from sparsify.methods._base import Method, Problem, PruneParams, Solution, check_problem
from sparsify.methods._target import teacher_target
from sparsify.methods.sparsegpt_refit import sweep_and_refit
from sparsify.pattern import Pattern


def solve(problem: Problem, pattern: Pattern, params: PruneParams) -> Solution:
    """Find T, the dense weight for the dense model's output; sweep from T and refit to T.

    Args:
        problem: the weight, `wanted_OI` or moments with `cross_II`, and the allowed mask if
            there is one.
        pattern: any; see `kernels.sweep.sweep`.
        params: damping, block_size, refit_iterations, teacher_share, residual_share.

    Raises:
        InputError, NonFiniteError, SingularHessianError: see `sparsegpt.solve`.

    Reference: `_target.teacher_target`, then as the method sparsegpt_refit.

    Cost: that of sparsegpt_refit and three products of (O, I) with (I, I).
    """
    check_problem(problem, pattern)
    return sweep_and_refit(problem, teacher_target(problem, params), pattern, params)


METHOD = Method(
    name="sparsegpt_teacher",
    summary="SparseGPT and a least-squares solve towards the dense model's output",
    needs_hessian=True,
    needs_factor=True,
    needs_teacher=True,
    order="layer",
    takes_stacks=True,
    solve=solve,
)
