"""SparseGPT's sweep over the columns of a weight, fast on every device.

Shape suffixes: O output features (rows), I input features (columns), B columns of one block, G
columns of one group. Transposed tensors (I, O) keep every column of the weight contiguous, which is
what the sweep reads and writes. Of a stack of weights all tensors have a leading dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels import _sweep_triton
from sparsify.kernels.precision import add_product_, float32_products
from sparsify.masks.select import keep_highest, keep_top
from sparsify.pattern import Pattern

KERNEL_GROUPS = (2, 4, 8, 16)
"""M of the patterns that kernels choose masks for, here and in the search of ADMM"""

_STEP = 8  # columns per step for unstructured patterns, where the mask does not prescribe one


def sweep(
    work_OI: Tensor,
    upper_II: Tensor,
    pattern: Pattern,
    block_size: int,
    allowed_OI: Tensor | None = None,
    is_mask_fixed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Prune from the left column to the right; columns to the right make up for the error.

    At the first column of each group of m, the group's mask is chosen from the weights as
    adjusted so far, keeping the n largest |w| / U_jj, of equals the left one. A pruned weight w_j
    leaves the error e_j = w_j / U_jj, and every later column k receives -e_j U_jk.

    Args:
        work_OI: (O, I) float32 or float64; not changed. Rows are independent of each other. Or a
            stack (E, O, I), each with a U of its own.
        upper_II: (I, I) U, upper triangular, of the same dtype, with inverse(H) = U^T U; or
            (E, I, I).
        pattern: for unstructured, each block of `block_size` columns gets its mask at once and
            each row of it a quota; quotas are cumulative, so that a row's total is exact.
        block_size: columns whose errors reach the columns to the right by one product; a multiple
            of m. With N:M the result does not depend on it but for rounding.
        allowed_OI: bool of the weight's shape; what is False is never kept, so a group may keep
            fewer than n.
        is_mask_fixed: True keeps exactly `allowed_OI`.

    Returns:
        The pruned weight, 0.0 where pruned, and the keep mask, bool, of the shape of `work_OI`.

    Reference: SparseGPT (arXiv:2301.00774), Algorithm 1 with U = Cholesky(H^-1)^T.

    Cost: O I^2 operations, of which all but O I block_size are products between blocks; two copies
    of the weight. On a GPU float32 N:M with m a power of two up to 16 takes one kernel and one
    product per block; what is left takes some ten operations per group, as on the CPU. A stack
    takes as many launches as one weight.
    """
    assert not (is_mask_fixed and allowed_OI is None), "a fixed mask must be given"
    with float32_products():
        if work_OI.is_cuda and work_OI.dtype == torch.float32 and pattern.m in KERNEL_GROUPS:
            return _sweep_triton.sweep(
                work_OI, upper_II, pattern.n, pattern.m, block_size, allowed_OI, is_mask_fixed
            )
        return _sweep_by_columns(work_OI, upper_II, pattern, block_size, allowed_OI, is_mask_fixed)


def _sweep_by_columns(
    work_OI: Tensor,
    upper_II: Tensor,
    pattern: Pattern,
    block_size: int,
    allowed_OI: Tensor | None,
    is_mask_fixed: bool,
) -> tuple[Tensor, Tensor]:
    """The sweep in operations on whole columns."""
    num_columns = work_OI.shape[-1]
    work_IO = work_OI.mT.clone(memory_format=torch.contiguous_format)
    keep_IO = torch.empty_like(work_IO, dtype=torch.bool)
    inverse_I1 = upper_II.diagonal(dim1=-2, dim2=-1).reciprocal().unsqueeze(-1)
    # One pair of buffers for all blocks: fresh ones cost more than what is computed in them.
    error_BO = torch.empty_like(work_IO[..., :block_size, :])
    pruned_BO = torch.empty_like(error_BO)
    for start in range(0, num_columns, block_size):
        stop = min(start + block_size, num_columns)
        now, done, later = slice(start, stop), slice(stop - start), slice(stop, None)
        block = _Block(
            work_IO[..., now, :], error_BO[..., done, :], pruned_BO[..., done, :],
            upper_II[..., now, now].contiguous(), inverse_I1[..., now, :], pattern,
            None if allowed_OI is None else allowed_OI[..., now].mT, is_mask_fixed,
        )  # fmt: skip
        if is_mask_fixed and block.allowed_BO is not None:
            block.pruned_BO.copy_(~block.allowed_BO)
        elif not pattern.is_structured:
            block.choose_at_once(pattern.num_kept(stop) - pattern.num_kept(start))
        block.solve(0, len(block.groups))
        torch.eq(block.pruned_BO, 0, out=keep_IO[..., now, :])
        block.work_BO.masked_fill_(~keep_IO[..., now, :], 0.0)
        add_product_(work_IO[..., later, :], upper_II[..., now, later].mT, block.error_BO, alpha=-1)
    return work_IO.mT.contiguous(), keep_IO.mT.contiguous()


class _Block:
    """Some columns that are solved before their errors reach the columns to the right of them."""

    def __init__(
        self,
        work_BO: Tensor,
        error_BO: Tensor,
        pruned_BO: Tensor,
        upper_BB: Tensor,
        inverse_B1: Tensor,
        pattern: Pattern,
        allowed_BO: Tensor | None,
        is_mask_fixed: bool,
    ) -> None:
        """Take views; `error_BO` and `pruned_BO` (1 or 0, for products) are written.

        Views of all groups are cut at once: cut one by one they cost as much as the arithmetic.
        """
        self.work_BO, self.error_BO, self.pruned_BO = work_BO, error_BO, pruned_BO
        self.upper_BB, self.inverse_B1, self.allowed_BO = upper_BB, inverse_B1, allowed_BO
        self.pattern, self.chooses_groups = pattern, pattern.is_structured and not is_mask_fixed
        self.step = pattern.m or _STEP
        before_BB = upper_BB.triu(1).mT
        self.groups = [
            _Group(
                work_GO, error_GO, pruned_GO, inverse_G1, before_BG[..., left : left + self.step, :]
            )
            for left, work_GO, error_GO, pruned_GO, inverse_G1, before_BG in zip(
                range(0, work_BO.shape[-2], self.step),
                work_BO.split(self.step, dim=-2),
                error_BO.split(self.step, dim=-2),
                pruned_BO.split(self.step, dim=-2),
                inverse_B1.split(self.step, dim=-2),
                before_BB.split(self.step, dim=-1),
                strict=True,
            )
        ]

    def choose_at_once(self, quota: int) -> None:
        """The whole block's mask, with `quota` weights kept in each row."""
        scores_OB = _score(self.work_BO, self.inverse_B1, self.allowed_BO).mT
        keep_BO = keep_top(scores_OB, quota).mT
        self.pruned_BO.copy_(~(keep_BO if self.allowed_BO is None else keep_BO & self.allowed_BO))

    def solve(self, first: int, last: int) -> None:
        """Solve the groups from `first` until `last`: half, its errors' effect, the other half.

        Halves make the products between them as square as can be.
        """
        if last - first == 1:
            if self.chooses_groups:
                self._choose(first)
            self._solve_group(self.groups[first])
            return
        half = (first + last + 1) // 2
        self.solve(first, half)
        edges = [self.step * group for group in (first, half, last)]
        left, right = slice(*edges[:2]), slice(*edges[1:])
        upper_LR = self.upper_BB[..., left, right]
        add_product_(
            self.work_BO[..., right, :], upper_LR.mT, self.error_BO[..., left, :], alpha=-1
        )
        self.solve(half, last)

    def _solve_group(self, group: _Group) -> None:
        """Errors of one group, and their effect inside of it.

        With p_j = 1 / U_jj where pruned and 0 where kept, e_j = p_j (w_j - sum_{i<j} e_i U_ij).
        Starting from e = p w, each pass makes one more of a row's errors right, from the left, so
        that k pruned weights take k - 1 passes. A pass is two operations for all columns at once.
        """
        most_pruned = group.work_GO.shape[-2]
        if self.chooses_groups and self.allowed_BO is None:
            most_pruned -= self.pattern.n
        scale_GO = group.pruned_GO * group.inverse_G1
        torch.mul(group.work_GO, scale_GO, out=group.error_GO)
        first_GO = group.error_GO.clone() if most_pruned > 2 else group.error_GO
        for _ in range(most_pruned - 1):
            sum_GO = group.before_GG @ group.error_GO
            torch.addcmul(first_GO, scale_GO, sum_GO, value=-1, out=group.error_GO)
        add_product_(group.work_GO, group.before_GG, group.error_GO, alpha=-1)

    def _choose(self, index: int) -> None:
        """Keep the n highest scores of the group, of equals the left one."""
        group = self.groups[index]
        allowed_GO = None
        if self.allowed_BO is not None:
            columns = slice(index * self.step, (index + 1) * self.step)
            allowed_GO = self.allowed_BO[..., columns, :]
        scores_GO = _score(group.work_GO, group.inverse_G1, allowed_GO)
        if (self.pattern.n, self.pattern.m) == (2, 4) and allowed_GO is None:
            torch.lt(scores_GO, _second_highest(scores_GO), out=group.pruned_GO)
            if float(group.pruned_GO.sum()) == scores_GO.numel() / 2:
                return  # no ties
        keep_GO = torch.stack(keep_highest(scores_GO.unbind(-2), self.pattern.n), dim=-2)
        group.pruned_GO.copy_(~(keep_GO if allowed_GO is None else keep_GO & allowed_GO))


class _Group(NamedTuple):
    """Views of one group of a block; see there."""

    work_GO: Tensor
    error_GO: Tensor
    pruned_GO: Tensor
    inverse_G1: Tensor
    """1 / U_jj"""
    before_GG: Tensor
    """entry (k, j) is U_jk for the columns j before k, else 0"""


def _score(weight_GO: Tensor, inverse_G1: Tensor, allowed_GO: Tensor | None) -> Tensor:
    """|w| / U_jj, lower than any other where a weight is not allowed."""
    scores_GO = (weight_GO * inverse_G1).abs_()
    return scores_GO if allowed_GO is None else scores_GO.masked_fill_(~allowed_GO, -1.0)


def _second_highest(scores_GO: Tensor) -> Tensor:
    """The second highest of four numbers, position by position: (1, O).

    It is the lower of two pairs' winners or the higher of their losers, whichever is higher.
    """
    first_2O, second_2O = scores_GO.unflatten(-2, (2, 2)).unbind(-3)
    lower = torch.minimum(first_2O, second_2O).unbind(-2)
    higher = torch.maximum(first_2O, second_2O).unbind(-2)
    return torch.maximum(torch.minimum(*higher), torch.maximum(*lower)).unsqueeze(-2)
