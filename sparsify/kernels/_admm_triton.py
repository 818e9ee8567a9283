"""The search for a mask by ADMM on GPUs: products, and two kernels in each iteration.

`sparsify.methods.admm` says what is searched, and its PyTorch code is the reference. Here the
product of X is not carried along but what it lacks, E = (B - X) A, of which the first is zero and
takes no product.

Shape suffixes: O output features (rows), I input features (columns), K numbers of a row, R rows of
all weights, E weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.kernels._columns_triton import highest
from sparsify.kernels.precision import half_matmul
from sparsify.kernels.triton_jit import jit, require_triton, tl, triton

_TILE = 2048  # of a row that a program holds at one time: 8 numbers of each matrix per thread


def search(
    dense_OI: Tensor,
    keep_OI: Tensor,
    correlation_II: Tensor,
    penalties: Sequence[float],
    num_kept: int,
    group: int,
    allowed_OI: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `methods.admm.search`, for groups of 2, 4, 8 or 16 columns and two steps an iteration.

    Args:
        dense_OI: float32 B, overwritten; (E, O, I) for several weights of one shape.
        keep_OI: bool, the mask of the projection of B; not changed.
        correlation_II: A, float32, of several weights (E, I, I); or float16, and directions are
            then multiplied as `precision.half_product` does.
        penalties: one for each iteration, at least one.
        num_kept: of a group.
        group: columns of a group.
        allowed_OI: bool; what is False is never kept.

    Returns:
        Z and its keep mask. A row's bits depend on no other row but through the products.

    Raises:
        InputError: Triton is not installed.

    Cost: two products an iteration, and beside them 23 reads and writes of an (O, I) matrix (20
    with A in float32): 15 (14) of them in memory, where a cache holds the rows that are worked on.
    Seven (O, I) matrices, and half of another with A in float16.
    """
    require_triton()
    num_columns = dense_OI.shape[-1]
    num_rows = dense_OI.numel() // num_columns
    is_half = correlation_II.dtype == torch.float16
    dense_OI, start_OI = dense_OI.contiguous(), keep_OI.contiguous()
    keep_OI = torch.empty_like(start_OI)
    missing_OI, dual_OI = torch.zeros_like(dense_OI), torch.zeros_like(dense_OI)
    first_OI, second_OI = torch.empty_like(dense_OI), torch.empty_like(dense_OI)
    half_OI = torch.empty_like(dense_OI, dtype=torch.float16) if is_half else dense_OI
    numbers_KR = dense_OI.new_empty(len(_NUMBERS), num_rows)
    tile = min(int(triton.next_power_of_2(num_columns)), _TILE)
    shape = {"IS_HALF": is_half, "B": tile, "num_warps": 8 if tile == _TILE else 4}

    def image(direction_OI: Tensor) -> Tensor:
        if is_half:
            return half_matmul(half_OI, correlation_II)
        return direction_OI @ correlation_II

    with torch.cuda.device_of(dense_OI):
        _admm_start_kernel[(num_rows,)](
            dense_OI, start_OI, first_OI, half_OI, numbers_KR,
            num_rows, num_columns, penalties[0], **shape,
        )  # fmt: skip
        for penalty, following in zip(penalties, [*penalties[1:], None], strict=True):
            first_image_OI = image(first_OI)
            _admm_step_kernel[(num_rows,)](
                first_OI, first_image_OI, second_OI, half_OI, numbers_KR,
                num_rows, num_columns, penalty, **shape,
            )  # fmt: skip
            second_image_OI = image(second_OI)
            _admm_turn_kernel[(num_rows,)](
                dense_OI, missing_OI, dual_OI, first_OI, first_image_OI, second_OI,
                second_image_OI, half_OI, keep_OI,
                keep_OI if allowed_OI is None else allowed_OI.contiguous(), numbers_KR,
                num_rows, num_columns, penalty, 1.0 if following is None else following,
                N=num_kept, M=group, HAS_ALLOWED=allowed_OI is not None,
                IS_LAST=following is None, **shape,
            )  # fmt: skip
            del first_image_OI, second_image_OI
    return dense_OI, keep_OI


_NUMBERS = ("size", "step", "largest of the first", "largest of the second")
"""what kernels leave of a row for those that follow: the residual's square; the first step; and
what directions in float16 were divided by"""

_TINY = tl.constexpr(1.1754943508222875e-38) if tl else None
"""the smallest normal number: a row without residual has size 0 and stays"""


@jit
def _write_half(
    from_ptr: tl.tensor, to_ptr: tl.tensor, largest: tl.tensor, num_columns: tl.tensor,
    B: tl.constexpr,
) -> None:  # fmt: skip
    """A row over its largest number, in float16."""
    tl.debug_barrier()  # all of the row is written
    for start in range(0, num_columns, B):
        column = start + tl.arange(0, B)
        inside = column < num_columns
        value = tl.load(from_ptr + column, mask=inside, other=0.0)
        tl.store(to_ptr + column, tl.div_rn(value, largest).to(tl.float16), mask=inside)


@jit
def _admm_start_kernel(
    dense_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    first_ptr: tl.tensor,
    half_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    penalty: tl.tensor,
    IS_HALF: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """The first direction of a row: r (Z - B), where E and V are zero."""
    row = tl.program_id(0).to(tl.int64)
    at = row * num_columns
    squares = tl.zeros((B,), dtype=tl.float32)
    sizes = squares
    for start in range(0, num_columns, B):
        column = start + tl.arange(0, B)
        inside = column < num_columns
        dense = tl.load(dense_ptr + at + column, mask=inside, other=0.0)
        kept = tl.load(keep_ptr + at + column, mask=inside, other=0).to(tl.int32)
        first = tl.where(kept != 0, 0.0, -penalty * dense)
        tl.store(first_ptr + at + column, first, mask=inside)
        squares += first * first
        sizes = tl.maximum(sizes, tl.abs(first))
    tl.store(numbers_ptr + row, tl.sum(squares, axis=0))
    if IS_HALF:
        largest = tl.maximum(tl.max(sizes, axis=0), _TINY)
        tl.store(numbers_ptr + 2 * num_rows + row, largest)
        _write_half(first_ptr + at, half_ptr + at, largest, num_columns, B)


@jit
def _admm_step_kernel(
    first_ptr: tl.tensor,
    image_ptr: tl.tensor,
    second_ptr: tl.tensor,
    half_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    penalty: tl.tensor,
    IS_HALF: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """The length of a row's first step, and its second direction.

    `_admm_turn_kernel` takes both steps. A row is gone through for the curvature, for the
    residual's square and for the direction.
    """
    row = tl.program_id(0).to(tl.int64)
    at = row * num_columns
    before = tl.load(numbers_ptr + row)
    scale = 1.0
    if IS_HALF:
        scale = tl.load(numbers_ptr + 2 * num_rows + row)
    products = tl.zeros((B,), dtype=tl.float32)
    for start in range(0, num_columns, B):
        column = start + tl.arange(0, B)
        inside = column < num_columns
        first = tl.load(first_ptr + at + column, mask=inside, other=0.0)
        image = tl.load(image_ptr + at + column, mask=inside, other=0.0) * scale
        products += first * image
    # The first direction is the residual, whose square is known.
    curvature = tl.sum(products, axis=0) + penalty * before
    step = before / tl.maximum(curvature, _TINY)
    squares = tl.zeros((B,), dtype=tl.float32)
    for start in range(0, num_columns, B):
        column = start + tl.arange(0, B)
        inside = column < num_columns
        first = tl.load(first_ptr + at + column, mask=inside, other=0.0)
        image = tl.load(image_ptr + at + column, mask=inside, other=0.0) * scale
        residual = first - step * (image + penalty * first)
        squares += residual * residual
    size = tl.sum(squares, axis=0)
    share = size / tl.maximum(before, _TINY)
    sizes = tl.zeros((B,), dtype=tl.float32)
    for start in range(0, num_columns, B):
        column = start + tl.arange(0, B)
        inside = column < num_columns
        first = tl.load(first_ptr + at + column, mask=inside, other=0.0)
        image = tl.load(image_ptr + at + column, mask=inside, other=0.0) * scale
        residual = first - step * (image + penalty * first)
        second = residual + share * first
        tl.store(second_ptr + at + column, second, mask=inside)
        sizes = tl.maximum(sizes, tl.abs(second))
    tl.store(numbers_ptr + row, size)
    tl.store(numbers_ptr + num_rows + row, step)
    if IS_HALF:
        largest = tl.maximum(tl.max(sizes, axis=0), _TINY)
        tl.store(numbers_ptr + 3 * num_rows + row, largest)
        _write_half(second_ptr + at, half_ptr + at, largest, num_columns, B)


@jit
def _admm_turn_kernel(
    dense_ptr: tl.tensor,
    missing_ptr: tl.tensor,
    dual_ptr: tl.tensor,
    first_ptr: tl.tensor,
    first_image_ptr: tl.tensor,
    second_ptr: tl.tensor,
    second_image_ptr: tl.tensor,
    half_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    allowed_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    penalty: tl.tensor,
    following: tl.tensor,
    N: tl.constexpr,
    M: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    IS_LAST: tl.constexpr,
    IS_HALF: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """Both steps of a row's X and E, its Z and V, and the first direction of the next iteration.

    The last iteration leaves Z in the place of X, and its mask.
    """
    row = tl.program_id(0).to(tl.int64)
    at = row * num_columns
    size = tl.load(numbers_ptr + row)
    first_step = tl.load(numbers_ptr + num_rows + row)
    first_scale = 1.0
    second_scale = 1.0
    if IS_HALF:
        first_scale = tl.load(numbers_ptr + 2 * num_rows + row)
        second_scale = tl.load(numbers_ptr + 3 * num_rows + row)
    products = tl.zeros((B,), dtype=tl.float32)
    squares = products
    for start in range(0, num_columns, B):
        column = start + tl.arange(0, B)
        inside = column < num_columns
        second = tl.load(second_ptr + at + column, mask=inside, other=0.0)
        image = tl.load(second_image_ptr + at + column, mask=inside, other=0.0)
        products += second * (image * second_scale)
        squares += second * second
    curvature = tl.sum(products, axis=0) + penalty * tl.sum(squares, axis=0)
    second_step = size / tl.maximum(curvature, _TINY)
    members = tl.arange(0, M)
    groups = tl.arange(0, B // M)
    new_squares = tl.zeros((B // M, M), dtype=tl.float32)
    sizes = new_squares
    for start in range(0, num_columns, B):
        column = start + groups[:, None] * M + members[None, :]
        inside = column < num_columns
        place = at + column
        first = tl.load(first_ptr + place, mask=inside, other=0.0)
        second = tl.load(second_ptr + place, mask=inside, other=0.0)
        dense = tl.load(dense_ptr + place, mask=inside, other=0.0)
        dual = tl.load(dual_ptr + place, mask=inside, other=0.0)
        dense += first_step * first
        dense += second_step * second
        joint = dense + dual / penalty
        score = tl.abs(joint)
        if HAS_ALLOWED:
            allowed = tl.load(allowed_ptr + place, mask=inside, other=0).to(tl.int32)
            score = tl.where(allowed != 0, score, -1.0)
        chosen = highest(score, members, 0, N, M)
        if HAS_ALLOWED:
            chosen = chosen & (allowed != 0)
        sparse = tl.where(chosen, joint, 0.0)
        if IS_LAST:
            tl.store(dense_ptr + place, sparse, mask=inside)
            tl.store(keep_ptr + place, chosen, mask=inside)
        else:
            missing = tl.load(missing_ptr + place, mask=inside, other=0.0)
            first_image = tl.load(first_image_ptr + place, mask=inside, other=0.0)
            second_image = tl.load(second_image_ptr + place, mask=inside, other=0.0)
            missing -= first_step * (first_image * first_scale)
            missing -= second_step * (second_image * second_scale)
            dual += penalty * (dense - sparse)
            residual = missing - dual + following * (sparse - dense)
            tl.store(dense_ptr + place, dense, mask=inside)
            tl.store(missing_ptr + place, missing, mask=inside)
            tl.store(dual_ptr + place, dual, mask=inside)
            tl.store(first_ptr + place, residual, mask=inside)
            new_squares += residual * residual
            sizes = tl.maximum(sizes, tl.abs(residual))
    if not IS_LAST:
        tl.store(numbers_ptr + row, tl.sum(tl.sum(new_squares, axis=1), axis=0))
        if IS_HALF:
            largest = tl.maximum(tl.max(tl.max(sizes, axis=1), axis=0), _TINY)
            tl.store(numbers_ptr + 2 * num_rows + row, largest)
            _write_half(first_ptr + at, half_ptr + at, largest, num_columns, B)
