"""ADMM: let a dense and a sparse copy of the weight pull each other until they agree on a mask.

Shape suffixes: O output features (rows), I input features (columns), O1 one number per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels import _admm_triton
from sparsify.kernels.precision import float32_products, half_product
from sparsify.kernels.sweep import KERNEL_GROUPS
from sparsify.methods._base import (
    Method,
    Problem,
    PruneParams,
    Solution,
    check_problem,
    chosen_mask,
    working_weight,
)
from sparsify.methods._refit import damped_hessian, has_kernels, objective, refit_with_errors
from sparsify.pattern import Pattern

_PENALTY = 0.3  # of the first iterations, where 1 is the mean of the Hessian's scaled diagonal

_GROWTH, _GROW_EVERY = 1.8, 3

_CG_STEPS = 2


def solve(problem: Problem, pattern: Pattern, params: PruneParams) -> Solution:
    """Search the mask by ADMM from the dense weight, then refit the kept weights.

    Args:
        problem: the weight, the moments, and the allowed mask if there is one. With a fixed
            mask only the refit is left.
        pattern: any; for unstructured, weights compete within their row.
        params: damping, admm_iterations, search_precision, refit_iterations.

    Raises:
        InputError: see `check_problem`.
        NonFiniteError: the weight holds NaN or infinity.

    Reference: see `search_and_refit`. No factorisation, so nothing can be singular.

    Cost: (2 admm_iterations + refit_iterations + 4) products of (O, I) with (I, I), on a GPU one
    fewer.
    """
    check_problem(problem, pattern)
    target_OI = working_weight(problem.weight_OI, problem.name)
    dead_I = problem.hessian_II.diagonal(dim1=-2, dim2=-1) == 0
    target_OI.masked_fill_(dead_I.unsqueeze(-2), 0.0)
    damped_II = damped_hessian(problem.hessian_II, params.damping, target_OI.dtype)
    pruned_OI, keep_OI = search_and_refit(target_OI, damped_II, problem, pattern, params)
    pruned_OI = pruned_OI.to(problem.weight_OI.dtype)
    return Solution(pruned_OI, keep_OI, params.damping, dead_I.sum(-1))


def search_and_refit(
    target_OI: Tensor, damped_II: Tensor, problem: Problem, pattern: Pattern, params: PruneParams
) -> tuple[Tensor, Tensor]:
    """The mask of `search` and its kept weights by `refit.refit`, or the projection of T.

    ADMM promises nothing for a row. Where the inputs hardly correlate, keeping the largest
    weights as they are is best, so a row for which the search found nothing better keeps those.

    Returns:
        Z and its keep mask; no row has a larger error than Wanda's choice out of T.
    """
    simple_mask_OI = chosen_mask(target_OI.abs() * column_scales(damped_II), problem, pattern)
    found_OI, keep_OI = search(target_OI, damped_II, problem, pattern, params, simple_mask_OI)
    weight_OI, error_O = refit_with_errors(
        found_OI, target_OI, keep_OI, damped_II, params.refit_iterations
    )
    simple_OI = target_OI.masked_fill(~simple_mask_OI, 0.0)
    is_better_O1 = (error_O < objective(simple_OI, target_OI, damped_II)).unsqueeze(-1)
    return (
        torch.where(is_better_O1, weight_OI, simple_OI),
        torch.where(is_better_O1, keep_OI, simple_mask_OI),
    )


@float32_products()
def search(
    target_OI: Tensor, damped_II: Tensor, problem: Problem, pattern: Pattern, params: PruneParams,
    keep_OI: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Look for the mask on which tr (Z - T) H_l (Z - T)^T is small.

    Columns are scaled to a unit diagonal: D = diag(H_l)^1/2, A = D^-1 H_l D^-1, B = T D, Y = B A.
    X starts at B, V at 0 and Z at the projection P of B, which keeps the largest of every group.
    Each iteration, with the penalty r growing from 0.3 by 1.8 every third time,

        X <- two steps of conjugate gradients on X (A + r I) = Y - V + r Z,
        Z <- P(X + V / r),    V <- V + r (X - Z).

    Args:
        target_OI: T, float32 or float64.
        damped_II: H_l of the same dtype, see `refit.damped_hessian`.
        problem: allowed_OI and is_mask_fixed are read.
        pattern: what P projects to.
        params: admm_iterations, of which 0 gives the projection of T, which is Wanda's mask; and
            search_precision, of all products but the first. A mask comes from a comparison, so
            it can do with less than the weights that `refit` finds.
        keep_OI: the mask of P(B).

    Returns:
        Z D^-1 and its keep mask.

    Reference: ADMM pruning (arXiv:2401.02938) and ALPS (arXiv:2406.07831), equation 5. Deviation:
    conjugate gradients in place of a factorisation for every r; X A is carried along instead of
    multiplied again. Started from Z, not from the dense weight, it cannot promise to improve: the
    penalty moves Z away first.

    Cost: 2 admm_iterations + 1 products of (O, I) with (I, I); seven (O, I) matrices, and in half
    precision half of another and of (I, I). On a GPU float32 N:M with m a power of two up to 16
    takes two kernels an iteration beside the products, of which it needs one fewer.
    """
    scale_1I = column_scales(damped_II)
    correlation_II = damped_II / scale_1I / scale_1I.mT
    dense_OI = target_OI * scale_1I
    is_half = params.searches_in_half(target_OI.is_cuda)
    penalties = _penalties(0 if problem.is_mask_fixed else params.admm_iterations)
    if penalties and has_kernels(target_OI) and pattern.m in KERNEL_GROUPS:
        if is_half:
            correlation_II = correlation_II.half()  # at most 1 in size
        sparse_OI, keep_OI = _admm_triton.search(
            dense_OI, keep_OI, correlation_II, penalties, pattern.n, pattern.m, problem.allowed_OI
        )
        return sparse_OI.div_(scale_1I), keep_OI
    sparse_OI = dense_OI.masked_fill(~keep_OI, 0.0)
    if penalties:
        output_OI = dense_OI @ correlation_II
        dual_OI = torch.zeros_like(dense_OI)
        product_OI = output_OI.clone()
        if is_half:
            correlation_II = correlation_II.half()
    for penalty in penalties:
        residual_OI = (output_OI - dual_OI).add_(sparse_OI, alpha=penalty).sub_(product_OI)
        residual_OI.sub_(dense_OI, alpha=penalty)
        _approach(dense_OI, product_OI, residual_OI, correlation_II, penalty)
        joint_OI = torch.add(dense_OI, dual_OI, alpha=1 / penalty)
        keep_OI = chosen_mask(joint_OI.abs(), problem, pattern)
        sparse_OI = joint_OI.masked_fill_(~keep_OI, 0.0)
        dual_OI.add_(dense_OI - sparse_OI, alpha=penalty)
    return sparse_OI.div_(scale_1I), keep_OI


def _penalties(num_iterations: int) -> list[float]:
    found, penalty = [], _PENALTY
    for done in range(1, num_iterations + 1):
        found.append(penalty)
        if done % _GROW_EVERY == 0:
            penalty *= _GROWTH
    return found


def column_scales(damped_II: Tensor) -> Tensor:
    """D of `search`, (1, I)."""
    return damped_II.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)


def _approach(
    dense_OI: Tensor, product_OI: Tensor, residual_OI: Tensor, correlation_II: Tensor,
    penalty: float,
) -> None:  # fmt: skip
    """Steps of conjugate gradients, in place, for X (A + r I) and X A, from a residual of X.

    With A in float16 the products are `half_product`s. The residual is overwritten.
    """
    is_half = correlation_II.dtype == torch.float16
    direction_OI = residual_OI
    size_O1 = _row_squares(residual_OI)
    square_O1 = size_O1
    tiny = torch.finfo(size_O1.dtype).tiny
    for steps_left in reversed(range(_CG_STEPS)):
        if is_half:
            image_OI = half_product(direction_OI, correlation_II)
        else:
            image_OI = direction_OI @ correlation_II
        curvature_O1 = (direction_OI * image_OI).sum(-1, keepdim=True)
        curvature_O1 += penalty * square_O1
        # A row without residual has size 0 and stays.
        step_O1 = size_O1 / curvature_O1.clamp(min=tiny)
        dense_OI.addcmul_(direction_OI, step_O1)
        product_OI.addcmul_(image_OI, step_O1)
        if not steps_left:
            return
        image_OI.add_(direction_OI, alpha=penalty)
        residual_OI = torch.addcmul(residual_OI, image_OI, step_O1, value=-1)
        before_O1, size_O1 = size_O1, _row_squares(residual_OI)
        direction_OI.mul_(size_O1 / before_O1.clamp(min=tiny)).add_(residual_OI)
        square_O1 = _row_squares(direction_OI)


def _row_squares(matrix_OI: Tensor) -> Tensor:
    return matrix_OI.square().sum(-1, keepdim=True)


METHOD = Method(
    name="admm",
    summary="search the mask by ADMM, then a least-squares solve; slow, the lowest layer error",
    needs_hessian=True,
    takes_stacks=True,
    solve=solve,
)
