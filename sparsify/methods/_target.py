"""What a pruned layer should compute: the dense model's output instead of its own dense output.

Shape suffixes: O output features (rows), I input features (columns). A stack has a dimension before
these.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from sparsify.calibration.moments import InputMoments
from sparsify.kernels.precision import add_product_, float32_products
from sparsify.methods._base import Problem, PruneParams, working_weight

_TOKENS_PER_COLUMN = 15.0  # at which a measured target counts half

Numbers = TypeVar("Numbers", float, Tensor)


def shrinkage(num_tokens: Numbers, num_columns: int) -> Numbers:
    """n / (n + 15 I), the trust in a target that was measured on n tokens.

    The target has I numbers to fit for every output, so with few tokens per column it fits the
    noise of the calibration text; a small model's best share grew with the tokens in this way.
    """
    return num_tokens / (num_tokens + _TOKENS_PER_COLUMN * num_columns)


@float32_products()
def teacher_target(problem: Problem, params: PruneParams) -> Tensor:
    """The dense weights T that bring the dense model's output back from the layer's own input.

    The layer receives x, which the layers pruned before it have changed, where the dense model
    has y; the residual stream that its output is added to holds r where the dense model has r'.
    T minimises

        mean || T x - (W x + a W (y - x) + b (r' - r)) ||^2  +  l || T - W ||^2,

    so, with H = mean x x^T, P = mean (a W y + b (r' - r)) x^T and H_l = H + l I,

        T = W + [P - a W H] H_l^-1.

    a = 0 and b = 0 give the layer's own dense output, that is T = W. The damping l draws T to W.
    The inverse is U^T U from the factor, applied as two products. A layer that adds to no residual
    stream has b = 0, and all layers of its input share G = mean y x^T, of which P = a W G.

    Args:
        problem: with P in `wanted_OI`, measured with the shares of `params`; or, where it is None,
            with moments that have G in `cross_II`. Or a stack.
        params: damping; a = teacher_share, b = residual_share. What they add is multiplied by
            `shrinkage`.

    Returns:
        T (O, I), float32 or float64; zero in dead columns, whose input says nothing.

    Raises:
        NonFiniteError: the weight holds NaN or infinity, or see `hessian.inverse_factor`.
        SingularHessianError: see `hessian.inverse_factor`.

    Reference: the asymmetric calibration of GPTAQ (arXiv:2504.02692) and QEP (arXiv:2504.09629)
    for y; the residual term is a deviation, and so is the shrinkage.

    Cost: three products of (O, I) with (I, I), for a = 0 one less; an (I, I) matrix with G.
    """
    moments = problem.moments
    assert moments is not None, f"{problem.name}: the target needs calibration"
    assert problem.wanted_OI is not None or moments.cross_II is not None, (
        f"{problem.name}: the target needs the dense model"
    )
    target_OI = working_weight(problem.weight_OI, problem.name)
    factor = moments.factor(params.damping, problem.name)
    pull_OI = _pull(problem, moments, target_OI, params.teacher_share)
    num_columns = target_OI.shape[-1]
    if moments.tokens_E11 is None:
        pull_OI.mul_(shrinkage(moments.num_tokens, num_columns))
    else:
        pull_OI.mul_(shrinkage(moments.tokens_E11, num_columns).to(pull_OI.dtype))
    upper_II = factor.upper_II.to(target_OI.dtype)
    add_product_(target_OI, pull_OI @ upper_II.mT, upper_II)
    return target_OI.masked_fill_(factor.dead_columns.unsqueeze(-2), 0.0)


def _pull(problem: Problem, moments: InputMoments, weight_OI: Tensor, share: float) -> Tensor:
    """P - a W H of `teacher_target` for a given share a."""
    if problem.wanted_OI is not None:
        pull_OI = problem.wanted_OI.to(weight_OI.dtype, copy=True)
        hessian_II = moments.hessian_II.to(weight_OI.dtype)
        if share:
            add_product_(pull_OI, weight_OI, hessian_II, alpha=-share)
        return pull_OI
    if share == 0:
        return torch.zeros_like(weight_OI)
    assert moments.cross_II is not None
    gap_II = (moments.cross_II - moments.hessian_II).to(weight_OI.dtype)
    return (weight_OI @ gap_II).mul_(share)
