"""Re-solve the kept weights: least squares on a given mask by conjugate gradients.

Shape suffixes: O output features (rows), I input features (columns), O1 one number per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.calibration.hessian import row_energies
from sparsify.kernels.precision import float32_products


def damped_hessian(hessian_II: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """H_l = H + l I as a new matrix, the same that `hessian.inverse_factor` inverts.

    Args:
        hessian_II: mean of x x^T; not changed.
        damping: share of the mean diagonal over the columns that are not dead.
        dtype: of the result.

    Returns:
        (I, I). A dead column, zero on every token, gets the diagonal 1 + l: it is decoupled from
        the others, and its weights go where the target has them.
    """
    damped_II = hessian_II.to(dtype, copy=True)
    diagonal_I = damped_II.diagonal()
    dead_I = diagonal_I == 0
    scale = diagonal_I.sum() / (~dead_I).sum().clamp(min=1)
    scale = torch.where(dead_I.all(), torch.ones_like(scale), scale)
    diagonal_I += dead_I + damping * scale
    return damped_II


@float32_products()
def objective(weight_OI: Tensor, target_OI: Tensor, damped_II: Tensor) -> Tensor:
    """(O,) diagonal of (Z - T) H_l (Z - T)^T: what the refit and the search lower, row by row."""
    return row_energies(weight_OI - target_OI, damped_II)


@float32_products()
def refit(
    start_OI: Tensor, target_OI: Tensor, keep_mask_OI: Tensor, damped_II: Tensor, iterations: int
) -> Tensor:
    """Lower f(Z) = tr (Z - T) H_l (Z - T)^T over the weights that the mask keeps.

    Each row is a least-squares problem of its own, whose matrix is H_l on the row's kept columns.
    All rows take the steps of conjugate gradients together, preconditioned by the diagonal of
    H_l: one product with H_l for each step, and no factorisation, which would differ from row to
    row. With R the gradient's negative on the mask and Q = (P H_l) on the mask, every row has its
    own step <R, R/d> / <P, Q> and its own direction P <- R/d + beta P.

    Args:
        start_OI: Z to start from, zero off the mask; not changed.
        target_OI: T, the dense weights to replace.
        keep_mask_OI: bool, True = may be nonzero.
        damped_II: H_l, see `damped_hessian`; positive definite, dtype of the others.
        iterations: steps; 0 returns a copy of the start.

    Returns:
        Z in the dtype of the start, exactly 0.0 off the mask. A row stops when its gradient is
        down to rounding, and a row that rounding would leave worse than its start keeps the
        start, so no row of f ever grows.

    Reference: Hestenes and Stiefel (1952) with Jacobi preconditioning; as the last step of a
    pruner, ALPS (arXiv:2406.07831), algorithm 2.

    Cost: (iterations + 2) products of (O, I) with (I, I), five (O, I) matrices.
    """
    weight_OI = start_OI.masked_fill(~keep_mask_OI, 0.0)
    if iterations == 0:
        return weight_OI
    gone_OI = ~keep_mask_OI
    inverse_I = damped_II.diagonal().reciprocal()
    first_OI = (target_OI - weight_OI) @ damped_II
    residual_OI = first_OI.masked_fill(gone_OI, 0.0)
    scaled_OI = residual_OI * inverse_I
    direction_OI = scaled_OI.clone()
    size_O1 = (residual_OI * scaled_OI).sum(1, keepdim=True)
    least_O1 = size_O1 * torch.finfo(size_O1.dtype).eps ** 2
    change_OI = torch.zeros_like(weight_OI)
    for _ in range(iterations):
        product_OI = (direction_OI @ damped_II).masked_fill_(gone_OI, 0.0)
        curvature_O1 = (direction_OI * product_OI).sum(1, keepdim=True)
        step_O1 = _ratio(size_O1, curvature_O1, (size_O1 > least_O1) & (curvature_O1 > 0))
        change_OI.addcmul_(direction_OI, step_O1)
        residual_OI.addcmul_(product_OI, step_O1, value=-1)
        torch.mul(residual_OI, inverse_I, out=scaled_OI)
        before_O1, size_O1 = size_O1, (residual_OI * scaled_OI).sum(1, keepdim=True)
        direction_OI *= _ratio(size_O1, before_O1, before_O1 > least_O1)
        direction_OI += scaled_OI
    # f(Z + D) - f(Z) from the true products, since the residual of the steps has drifted.
    growth_OI = (change_OI @ damped_II).sub_(first_OI, alpha=2).mul_(change_OI)
    is_better_O1 = growth_OI.sum(1, keepdim=True) < 0
    return weight_OI + change_OI.masked_fill_(~is_better_O1, 0.0)


def _ratio(over: Tensor, under: Tensor, where: Tensor) -> Tensor:
    """over / under, and 0 where `where` is False, also for 0 / 0."""
    return torch.where(where, over / under.masked_fill(~where, 1.0), 0.0)
