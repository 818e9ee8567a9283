"""Re-solve the kept weights: least squares on a given mask by conjugate gradients.

Shape suffixes: O output features (rows), I input features (columns), O1 one number per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.calibration.hessian import row_energies
from sparsify.kernels import _refit_triton
from sparsify.kernels.precision import float32_products


def damped_hessian(hessian_II: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """H_l = H + l I as a new matrix, the same that `hessian.inverse_factor` inverts.

    Args:
        hessian_II: mean of x x^T, or a stack of them; not changed.
        damping: share of the mean diagonal over the columns that are not dead.
        dtype: of the result.

    Returns:
        (I, I). A dead column, zero on every token, gets the diagonal 1 + l: it is decoupled from
        the others, and its weights go where the target has them.
    """
    damped_II = hessian_II.to(dtype, copy=True)
    diagonal_I = damped_II.diagonal(dim1=-2, dim2=-1)
    dead_I = diagonal_I == 0
    scale_1 = diagonal_I.sum(-1, keepdim=True) / (~dead_I).sum(-1, keepdim=True).clamp(min=1)
    scale_1 = scale_1.masked_fill(dead_I.all(-1, keepdim=True), 1.0)
    diagonal_I += dead_I + damping * scale_1
    return damped_II


def has_kernels(matrix_OI: Tensor) -> bool:
    """Whether the kernels of a GPU take a matrix: float32, and not empty."""
    return matrix_OI.is_cuda and matrix_OI.dtype == torch.float32 and matrix_OI.numel() > 0


@float32_products()
def objective(weight_OI: Tensor, target_OI: Tensor, damped_II: Tensor) -> Tensor:
    """(O,) diagonal of (Z - T) H_l (Z - T)^T: what the refit and the search lower, row by row."""
    return row_energies(weight_OI - target_OI, damped_II)


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

    Cost: (iterations + 2) products of (O, I) with (I, I), six (O, I) matrices. On a GPU float32
    takes one kernel a step beside the product.
    """
    return refit_with_errors(start_OI, target_OI, keep_mask_OI, damped_II, iterations)[0]


@float32_products()
def refit_with_errors(
    start_OI: Tensor, target_OI: Tensor, keep_mask_OI: Tensor, damped_II: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """What `refit` finds, and its f row by row, (O,), which takes no product more.

    `objective` gives the same but for rounding.
    """
    weight_OI = start_OI.masked_fill(~keep_mask_OI, 0.0)
    gap_OI = target_OI - weight_OI
    first_OI = gap_OI @ damped_II
    error_O = gap_OI.mul_(first_OI).sum(-1)
    del gap_OI
    if iterations == 0:
        return weight_OI, error_O
    if has_kernels(weight_OI):
        weight_OI = weight_OI.contiguous()
        growth_O = _refit_triton.descend(weight_OI, first_OI, keep_mask_OI, damped_II, iterations)
        return weight_OI, error_O + growth_O
    change_OI = _change(first_OI, ~keep_mask_OI, damped_II, iterations)
    # f(Z + D) - f(Z) from the true products, since the residual of the steps has drifted.
    growth_OI = (change_OI @ damped_II).sub_(first_OI, alpha=2).mul_(change_OI)
    growth_O1 = growth_OI.sum(-1, keepdim=True)
    is_worse_O1 = ~(growth_O1 < 0)
    weight_OI += change_OI.masked_fill_(is_worse_O1, 0.0)
    return weight_OI, error_O + growth_O1.masked_fill_(is_worse_O1, 0.0).squeeze(-1)


def _change(first_OI: Tensor, gone_OI: Tensor, damped_II: Tensor, iterations: int) -> Tensor:
    """What the steps of `refit` add to Z, given (T - Z) H_l and where the mask is False."""
    inverse_1I = damped_II.diagonal(dim1=-2, dim2=-1).reciprocal().unsqueeze(-2)
    residual_OI = first_OI.masked_fill(gone_OI, 0.0)
    direction_OI = residual_OI * inverse_1I
    size_O1 = (residual_OI * direction_OI).sum(-1, keepdim=True)
    least_O1 = size_O1 * torch.finfo(size_O1.dtype).eps ** 2
    change_OI = torch.zeros_like(first_OI)
    for steps_left in reversed(range(iterations)):
        product_OI = direction_OI @ damped_II
        # The direction is zero off the mask.
        curvature_O1 = (direction_OI * product_OI).sum(-1, keepdim=True)
        step_O1 = _ratio(size_O1, curvature_O1, (size_O1 > least_O1) & (curvature_O1 > 0))
        change_OI.addcmul_(direction_OI, step_O1)
        if not steps_left:
            break
        residual_OI.addcmul_(product_OI.masked_fill_(gone_OI, 0.0), step_O1, value=-1)
        scaled_OI = torch.mul(residual_OI, inverse_1I, out=product_OI)
        before_O1, size_O1 = size_O1, (residual_OI * scaled_OI).sum(-1, keepdim=True)
        direction_OI *= _ratio(size_O1, before_O1, before_O1 > least_O1)
        direction_OI += scaled_OI
    return change_OI


def _ratio(over: Tensor, under: Tensor, where: Tensor) -> Tensor:
    """over / under, and 0 where `where` is False, also for 0 / 0."""
    return torch.where(where, over / under.masked_fill(~where, 1.0), 0.0)
