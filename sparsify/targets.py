"""What a pruned layer should compute: the dense model's output instead of its own dense output.

Shape suffixes: O output features (rows), I input features (columns).
"""

from __future__ import annotations

from torch import Tensor

from sparsify.kernels.precision import float32_products
from sparsify.methods._base import Problem, PruneParams, working_weight

_TOKENS_PER_COLUMN = 15.0  # at which a measured target counts half


def shrinkage(num_tokens: int, num_columns: int) -> float:
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

    so, with H = mean x x^T, G = mean y x^T, C = mean (r' - r) x^T and H_l = H + l I,

        T = W + [a W (G - H) + b C] H_l^-1.

    a = 0 and b = 0 give the layer's own dense output, that is T = W. The damping l draws T to W.
    The inverse is U^T U from the factor, applied as two products.

    Args:
        problem: with statistics that have `cross_II`; `residual_OI` may be None, which is b = 0.
        params: damping; a = teacher_share and b = residual_share, both times `shrinkage`.

    Returns:
        T (O, I), float32 or float64; zero in dead columns, whose input says nothing.

    Raises:
        NonFiniteError: the weight holds NaN or infinity, or see `hessian.inverse_factor`.
        SingularHessianError: see `hessian.inverse_factor`.

    Reference: the asymmetric calibration of GPTAQ (arXiv:2504.02692) and QEP (arXiv:2504.09629)
    for y; the residual term is a deviation, and so is the shrinkage.

    Cost: three products of (O, I) with (I, I) and one (I, I) matrix, for a = 0 one less.
    """
    statistics = problem.statistics
    assert statistics is not None, f"{problem.name}: the target needs calibration"
    assert statistics.cross_II is not None, f"{problem.name}: the target needs the dense model"
    target_OI = working_weight(problem.weight_OI, problem.name)
    factor = statistics.factor(params.damping, problem.name)
    trust = shrinkage(statistics.num_tokens, target_OI.shape[1])
    pull_OI = target_OI.new_zeros(target_OI.shape)
    if params.teacher_share > 0:
        gap_II = (statistics.cross_II - statistics.hessian_II).to(target_OI.dtype)
        pull_OI.addmm_(target_OI, gap_II, alpha=trust * params.teacher_share)
    if params.residual_share > 0 and problem.residual_OI is not None:
        residual_OI = problem.residual_OI.to(target_OI.dtype)
        pull_OI.add_(residual_OI, alpha=trust * params.residual_share)
    upper_II = factor.upper_II.to(target_OI.dtype)
    target_OI.addmm_(pull_OI @ upper_II.T, upper_II)
    target_OI[:, factor.dead_columns] = 0.0
    return target_OI
