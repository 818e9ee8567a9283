"""Group descent: visit the groups of a row in turn and give each its best pattern and best values.

Shape suffixes: O output features (rows), I input features (columns), B columns of one block, M
columns of one group, Q groups, P patterns a group may have. Transposed blocks (B, O) keep every
column contiguous.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.kernels.precision import float32_products
from sparsify.methods._base import (
    Method,
    Problem,
    PruneParams,
    Solution,
    check_problem,
    chosen_mask,
    working_weight,
)
from sparsify.methods._refit import damped_hessian, refit
from sparsify.methods.sparsegpt import check_block_size
from sparsify.pattern import Pattern

_MAX_PATTERNS = 100  # of one group; 4:8 has 70


def solve(problem: Problem, pattern: Pattern, params: PruneParams) -> Solution:
    """Start from Wanda's mask, descend over the groups, refit the kept weights.

    Args:
        problem: the weight, the moments, and the allowed mask if there is one. With a fixed
            mask only the refit is left.
        pattern: N:M with at most 100 choices of n out of m, such as 2:4 and 4:8.
        params: damping, block_size, descent_sweeps, refit_iterations.

    Raises:
        InputError: see `check_problem` and `check_groups`; or m does not divide block_size.
        NonFiniteError: the weight holds NaN or infinity.

    Reference: see `descend` and `refit.refit`. No factorisation, so nothing can be singular.

    Cost: (descent_sweeps + refit_iterations + 4) products of (O, I) with (I, I), and O(O I (P m +
    block_size)) for each sweep.
    """
    check_problem(problem, pattern)
    check_groups(problem, pattern)
    check_block_size(params.block_size, pattern)
    target_OI = working_weight(problem.weight_OI, problem.name)
    dead_I = problem.hessian_II.diagonal() == 0
    target_OI[:, dead_I] = 0.0
    damped_II = damped_hessian(problem.hessian_II, params.damping, target_OI.dtype)
    keep_OI = chosen_mask(target_OI.abs() * damped_II.diagonal().sqrt(), problem, pattern)
    weight_OI = target_OI.masked_fill(~keep_OI, 0.0)
    if not problem.is_mask_fixed:
        keep_OI = descend(
            weight_OI, keep_OI, target_OI, damped_II, pattern,
            params.descent_sweeps, params.block_size, problem.allowed_OI,
        )  # fmt: skip
    pruned_OI = refit(weight_OI, target_OI, keep_OI, damped_II, params.refit_iterations)
    pruned_OI = pruned_OI.to(problem.weight_OI.dtype)
    return Solution(pruned_OI, keep_OI, params.damping, int(dead_I.sum()))


def check_groups(problem: Problem, pattern: Pattern) -> None:
    """Refuse patterns whose groups have no or too many choices to go through.

    Raises:
        InputError: unstructured, or more than 100 choices of n out of m.
    """
    if problem.is_mask_fixed:
        return
    if not pattern.is_structured or math.comb(pattern.m, pattern.n) > _MAX_PATTERNS:
        raise InputError(
            f"{problem.name}: the descent goes through every choice within a group, and pattern "
            f"{pattern} has no groups or over {_MAX_PATTERNS} choices in one; use "
            "prune.method=sparsegpt_refit or admm"
        )


@float32_products()
def descend(
    weight_OI: Tensor,
    keep_mask_OI: Tensor,
    target_OI: Tensor,
    damped_II: Tensor,
    pattern: Pattern,
    sweeps: int,
    block_size: int,
    allowed_OI: Tensor | None = None,
) -> Tensor:
    """Lower f(Z) = tr (Z - T) H_l (Z - T)^T group by group, mask and values together.

    For the columns g of a group, with all others held, f is a quadratic whose linear part is
    b = [(T - Z) H_l]_g + Z_g H_gg. Keeping the columns p of g, its minimum is at v_p = b_p H_pp^-1
    and lies v_p b_p^T below that of an empty group. All patterns p are tried, and the best one and
    its v_p replace Z_g. The present pattern is one of them, so f never grows.

    Args:
        weight_OI: Z, changed in place; zero off the mask.
        keep_mask_OI: bool, the mask of Z; not changed.
        target_OI: T, of the same dtype.
        damped_II: H_l, see `refit.damped_hessian`.
        pattern: N:M; see `check_groups`.
        sweeps: visits to every group; 0 changes nothing.
        block_size: columns whose changes reach the rest of the row by one product; a multiple of
            m. The result does not depend on it but for rounding.
        allowed_OI: bool; what is False is never kept, and a group with fewer than n allowed
            weights keeps fewer.

    Returns:
        The keep mask of the new Z.

    Reference: block coordinate descent, with the group's exact solution of optimal brain surgery
    (arXiv:2301.00774, equation 3, for a set of columns). Of equal patterns the one that comes
    first in lexical order survives.

    Cost: (sweeps + 1) products of (O, I) with (I, I) and O(O I (P m + block_size)) per sweep; the
    residual (O, I), and P m numbers for each column.
    """
    keep_OI = keep_mask_OI.clone()
    if sweeps == 0:
        return keep_OI
    member_PM, inverse_QPMM = _group_solvers(damped_II, pattern, allowed_OI is not None)
    residual_OI = (target_OI - weight_OI) @ damped_II
    num_columns = weight_OI.shape[1]
    for _ in range(sweeps):
        for start in range(0, num_columns, block_size):
            stop = min(start + block_size, num_columns)
            new_BO, keep_BO = _descend_block(
                _columns(weight_OI, start, stop),
                _columns(residual_OI, start, stop),
                damped_II[start:stop, start:stop],
                inverse_QPMM[start // pattern.m : stop // pattern.m],
                member_PM,
                None if allowed_OI is None else allowed_OI[:, start:stop].T,
            )
            change_OB = new_BO.T - weight_OI[:, start:stop]
            residual_OI.addmm_(change_OB, damped_II[start:stop], alpha=-1)
            weight_OI[:, start:stop] = new_BO.T
            keep_OI[:, start:stop] = keep_BO.T
    return keep_OI


def _columns(tensor_OI: Tensor, start: int, stop: int) -> Tensor:
    """Some columns as a (B, O) copy, also of a single row, which `contiguous` would not copy."""
    return tensor_OI[:, start:stop].T.clone(memory_format=torch.contiguous_format)


def _group_solvers(
    damped_II: Tensor, pattern: Pattern, with_smaller: bool
) -> tuple[Tensor, Tensor]:
    """The patterns of a group, and H_pp^-1 of every group and pattern, zero outside of p.

    With `with_smaller` the patterns that keep fewer than n come last, for groups in which not
    all n are allowed.
    """
    sizes = range(pattern.n, -1 if with_smaller else pattern.n - 1, -1)
    patterns = [p for size in sizes for p in combinations(range(pattern.m), size)]
    num_groups = len(damped_II) // pattern.m
    member_PM = torch.zeros(len(patterns), pattern.m, dtype=torch.bool, device=damped_II.device)
    blocks = damped_II.view(num_groups, pattern.m, num_groups, pattern.m)
    own_QMM = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    inverse_QPMM = own_QMM.new_zeros(num_groups, len(patterns), pattern.m, pattern.m)
    for index, p in enumerate(patterns):
        member_PM[index, list(p)] = True
        rows, columns = torch.meshgrid(*[torch.tensor(p, dtype=torch.long)] * 2, indexing="ij")
        inverse_QPMM[:, index, rows, columns] = torch.linalg.inv(own_QMM[:, rows, columns])
    return member_PM, inverse_QPMM


def _descend_block(
    weight_BO: Tensor,
    residual_BO: Tensor,
    damped_BB: Tensor,
    inverse_QPMM: Tensor,
    member_PM: Tensor,
    allowed_BO: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One visit to every group of a block; return its new weights and mask, both (B, O).

    `residual_BO`, (T - Z) H_l on the block, is used up: only groups to the right are kept current.
    """
    keep_BO = torch.empty_like(weight_BO, dtype=torch.bool)
    num_patterns, width = member_PM.shape
    for group, inverse_PMM in enumerate(inverse_QPMM):
        left, right = group * width, (group + 1) * width
        old_MO = weight_BO[left:right]
        linear_MO = torch.addmm(residual_BO[left:right], damped_BB[left:right, left:right], old_MO)
        values_PMO = (inverse_PMM.reshape(-1, width) @ linear_MO).view(num_patterns, width, -1)
        gain_PO = torch.einsum("pmo,mo->po", values_PMO, linear_MO)
        if allowed_BO is not None:
            forbidden_MO = (~allowed_BO[left:right]).to(gain_PO.dtype)
            gain_PO.masked_fill_(member_PM.to(gain_PO.dtype) @ forbidden_MO > 0, -math.inf)
        best_O = gain_PO.argmax(0)
        new_MO = values_PMO.gather(0, best_O.expand(1, width, -1))[0]
        change_MO = new_MO - old_MO
        residual_BO[right:].addmm_(damped_BB[right:, left:right], change_MO, alpha=-1)
        weight_BO[left:right] = new_MO
        keep_BO[left:right] = member_PM[best_O].T
    return weight_BO, keep_BO


METHOD = Method(
    name="group_descent",
    summary="coordinate descent over the groups, mask and values together; needs no factor",
    needs_hessian=True,
    solve=solve,
)
