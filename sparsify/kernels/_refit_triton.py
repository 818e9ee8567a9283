"""The refit's steps on GPUs: products, and one kernel after each.

`sparsify.methods._refit` says what is refitted, and its PyTorch code is the reference. Shape
suffixes: O output features (rows), I input features (columns), K numbers of a row, R rows of all
weights, E weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.triton_jit import jit, require_triton, tl, triton

_TILE = 2048  # of a row that a program holds at one time: 8 numbers of each matrix per thread


def descend(
    weight_OI: Tensor, first_OI: Tensor, keep_OI: Tensor, damped_II: Tensor, iterations: int
) -> Tensor:
    """Take the steps of `methods._refit.refit`, from what it has before the first of them.

    Args:
        weight_OI: float32 Z, contiguous, zero off the mask; moved, where a row gets better;
            (E, O, I) for several weights of one shape.
        first_OI: float32 (T - Z) H_l.
        keep_OI: bool.
        damped_II: float32 H_l, of several weights (E, I, I).
        iterations: at least 1.

    Returns:
        (O,) by how much f grew, 0 or less. A row's bits depend on no other row but through the
        products.

    Raises:
        InputError: Triton is not installed.

    Cost: iterations + 1 products, and 11.25 reads and writes of an (O, I) matrix for each step:
    7.25 of them in memory, where a cache holds the rows that are worked on. Six (O, I) matrices.
    """
    require_triton()
    num_outputs, num_columns = weight_OI.shape[-2:]
    num_rows = weight_OI.numel() // num_columns
    keep_OI = keep_OI.contiguous()
    residual_OI, direction_OI, change_OI = (torch.empty_like(weight_OI) for _ in range(3))
    inverse_I = damped_II.diagonal(dim1=-2, dim2=-1).reciprocal().contiguous()
    numbers_KR = weight_OI.new_empty(len(_NUMBERS), num_rows)
    tile = min(int(triton.next_power_of_2(num_columns)), _TILE)
    shape = {"B": tile, "num_warps": 8 if tile == _TILE else 4}
    with torch.cuda.device_of(weight_OI):
        _refit_start_kernel[(num_rows,)](
            first_OI, keep_OI, inverse_I, residual_OI, direction_OI, numbers_KR,
            num_rows, num_outputs, num_columns, **shape,
        )  # fmt: skip
        for iteration in range(iterations):
            _refit_step_kernel[(num_rows,)](
                direction_OI, direction_OI @ damped_II, keep_OI, inverse_I, residual_OI, change_OI,
                numbers_KR, num_rows, num_outputs, num_columns,
                IS_FIRST=iteration == 0, IS_LAST=iteration == iterations - 1, **shape,
            )  # fmt: skip
        _refit_accept_kernel[(num_rows,)](
            change_OI, change_OI @ damped_II, first_OI, weight_OI, numbers_KR,
            num_columns, **shape,
        )  # fmt: skip
    return numbers_KR[0].view(weight_OI.shape[:-1])


_NUMBERS = ("size", "least")
"""of a row: <R, R / d>, in the end the growth; and the size at which the row stops"""

_EPS_SQUARE = tl.constexpr(torch.finfo(torch.float32).eps ** 2) if tl else None


@jit
def _ratio(over: tl.tensor, under: tl.tensor, where: tl.tensor) -> tl.tensor:
    """over / under, and 0 where `where` is False, also for 0 / 0."""
    return tl.where(where, over / tl.where(where, under, 1.0), 0.0)


@jit
def _refit_start_kernel(
    first_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    direction_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_columns: tl.tensor,
    B: tl.constexpr,
) -> None:
    """A row's residual, its first direction and its size."""
    row = tl.program_id(0).to(tl.int64)
    at = row * num_columns
    inverse_ptr += row // num_outputs * num_columns
    products = tl.zeros((B,), dtype=tl.float32)
    for start in range(0, num_columns, B):
        column = start + tl.arange(0, B)
        inside = column < num_columns
        kept = tl.load(keep_ptr + at + column, mask=inside, other=0).to(tl.int32)
        first = tl.load(first_ptr + at + column, mask=inside, other=0.0)
        inverse = tl.load(inverse_ptr + column, mask=inside, other=0.0)
        residual = tl.where(kept != 0, first, 0.0)
        tl.store(residual_ptr + at + column, residual, mask=inside)
        tl.store(direction_ptr + at + column, residual * inverse, mask=inside)
        products += residual * (residual * inverse)
    size = tl.sum(products, axis=0)
    tl.store(numbers_ptr + row, size)
    tl.store(numbers_ptr + num_rows + row, size * _EPS_SQUARE)


@jit
def _refit_step_kernel(
    direction_ptr: tl.tensor,
    product_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    change_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_columns: tl.tensor,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """A row's step, and its next direction but after the last step.

    A row is gone through for the curvature, for the step and for the direction.
    """
    row = tl.program_id(0).to(tl.int64)
    at = row * num_columns
    before = tl.load(numbers_ptr + row)
    least = tl.load(numbers_ptr + num_rows + row)
    inverse_ptr += row // num_outputs * num_columns
    products = tl.zeros((B,), dtype=tl.float32)
    for start in range(0, num_columns, B):
        column = start + tl.arange(0, B)
        inside = column < num_columns
        # Zero off the mask, so that the product needs none.
        direction = tl.load(direction_ptr + at + column, mask=inside, other=0.0)
        products += direction * tl.load(product_ptr + at + column, mask=inside, other=0.0)
    curvature = tl.sum(products, axis=0)
    step = _ratio(before, curvature, (before > least) & (curvature > 0))
    products = tl.zeros((B,), dtype=tl.float32)
    for start in range(0, num_columns, B):
        column = start + tl.arange(0, B)
        inside = column < num_columns
        place = at + column
        change = step * tl.load(direction_ptr + place, mask=inside, other=0.0)
        if not IS_FIRST:
            change += tl.load(change_ptr + place, mask=inside, other=0.0)
        tl.store(change_ptr + place, change, mask=inside)
        if not IS_LAST:
            kept = tl.load(keep_ptr + place, mask=inside, other=0).to(tl.int32)
            product = tl.load(product_ptr + place, mask=inside, other=0.0)
            residual = tl.load(residual_ptr + place, mask=inside, other=0.0)
            inverse = tl.load(inverse_ptr + column, mask=inside, other=0.0)
            residual = tl.where(kept != 0, residual - step * product, 0.0)
            tl.store(residual_ptr + place, residual, mask=inside)
            products += residual * (residual * inverse)
    if not IS_LAST:
        size = tl.sum(products, axis=0)
        share = _ratio(size, before, before > least)
        for start in range(0, num_columns, B):
            column = start + tl.arange(0, B)
            inside = column < num_columns
            place = at + column
            residual = tl.load(residual_ptr + place, mask=inside, other=0.0)
            inverse = tl.load(inverse_ptr + column, mask=inside, other=0.0)
            direction = tl.load(direction_ptr + place, mask=inside, other=0.0)
            direction = share * direction + residual * inverse
            tl.store(direction_ptr + place, direction, mask=inside)
        tl.store(numbers_ptr + row, size)


@jit
def _refit_accept_kernel(
    change_ptr: tl.tensor,
    product_ptr: tl.tensor,
    first_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    num_columns: tl.tensor,
    B: tl.constexpr,
) -> None:
    """f(Z + D) - f(Z) of a row, and Z + D in the place of Z where that is below 0."""
    row = tl.program_id(0).to(tl.int64)
    at = row * num_columns
    products = tl.zeros((B,), dtype=tl.float32)
    for start in range(0, num_columns, B):
        column = start + tl.arange(0, B)
        inside = column < num_columns
        place = at + column
        first = tl.load(first_ptr + place, mask=inside, other=0.0)
        product = tl.load(product_ptr + place, mask=inside, other=0.0)
        change = tl.load(change_ptr + place, mask=inside, other=0.0)
        products += (product - 2.0 * first) * change
    growth = tl.sum(products, axis=0)
    tl.store(numbers_ptr + row, tl.where(growth < 0, growth, 0.0))
    if growth < 0:
        for start in range(0, num_columns, B):
            column = start + tl.arange(0, B)
            inside = column < num_columns
            place = at + column
            change = tl.load(change_ptr + place, mask=inside, other=0.0)
            weight = tl.load(weight_ptr + place, mask=inside, other=0.0)
            tl.store(weight_ptr + place, weight + change, mask=inside)
