"""GPTQ for GPUs: one kernel per segment of columns, for its elimination and for its descent.

The PyTorch code of `sparsify.quantization` is the reference. Equal values get equal levels here and
there (`_rounding_triton`); what differs is the last bits of sums, and of products that a GPU adds
without rounding them first.

A stack of weights, each with its matrix, has a leading dimension and takes the launches of one.
Shape suffixes: O output features (rows), R rows of one program, B columns of one segment or tile.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels._columns_triton import MAX_COLUMNS, ROWS, column_of, pushed_right
from sparsify.kernels._rounding_triton import KINDS, nearest, nearest_integer, quotient, stored
from sparsify.kernels.rounding import Rounding, Segment
from sparsify.kernels.triton_jit import jit, require_triton, tl, triton

_INNER = 16  # columns of one step of a product


def search(
    weight_OB: Tensor, keep_OB: Tensor, importance_B: Tensor, rounding: Rounding,
    tries: tuple[tuple[float, int], ...],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `quantization.scales.search_scales`: a group of any width.

    Args:
        weight_OB: float32 (O, B), or of a stack (E, O, B).
        keep_OB: bool.
        importance_B: float32, of each of a stack (E, B).
        rounding: of the levels.
        tries: shares of the widest scale, negative for negative scales, each with what is added
            to the zero point that fits it.

    Returns:
        (O,) scales as they will be stored, and zeros where the rounding has them; or (E, O).

    Raises:
        InputError: Triton is not installed.

    Cost: one kernel; O B levels for each of K tries, each of which reads the weights anew, from a
    cache where the group is narrow.
    """
    require_triton()
    width = weight_OB.shape[-1]
    scales_O = weight_OB.new_empty(weight_OB.shape[:-1])
    zeros_O = torch.empty_like(scales_O) if rounding.has_zeros else None
    if weight_OB.stride() != keep_OB.stride():
        weight_OB, keep_OB = weight_OB.contiguous(), keep_OB.contiguous()
    _launch(
        _search_kernel, rounding, (scales_O, zeros_O),
        [weight_OB, keep_OB, importance_B, _tensor(tries, weight_OB.device)],
        [*_strides(weight_OB, keep_OB), *_of_stack(importance_B, 1), width, len(tries)],
        B=_tile(width),
    )  # fmt: skip
    return scales_O, zeros_O


def eliminate_(segment: Segment, rounding: Rounding) -> Tensor:
    """See `quantization.segments.eliminate_`: float32, at most 128 columns.

    Raises:
        InputError: Triton is not installed.

    Cost: one kernel of O B^2 operations.
    """
    return _columns(_eliminate_kernel, segment, rounding)


def descend_(segment: Segment, rounding: Rounding, refits: bool) -> Tensor:
    """See `quantization.segments.descend_`: float32, at most 128 columns.

    Raises:
        InputError: Triton is not installed.

    Cost: one kernel of O B^2 operations, twice that where scales are refit.
    """
    largest = torch.finfo(torch.float16 if rounding.is_half else torch.float32).max
    return _columns(
        _descend_kernel, segment, rounding, largest, REFITS=refits, INNER=_INNER
    )  # fmt: skip


def _columns(
    kernel: Any, segment: Segment, rounding: Rounding, *numbers: float, **constants: Any
) -> Tensor:
    """Launch a kernel that goes through the columns; what it writes beside the levels."""
    require_triton()
    values_OB, levels_OB, keep_OB, matrix_BB, scales_O, zeros_O = segment
    width = values_OB.shape[-1]
    assert width <= MAX_COLUMNS, f"{width} columns"
    assert matrix_BB.stride(-1) == 1 or width == 1, "the matrix's rows are not contiguous"
    assert zeros_O is None or zeros_O.stride() == scales_O.stride(), "scales and zeros differ"
    change_OB = torch.empty_like(values_OB)
    sizes = [*_strides(values_OB, levels_OB, keep_OB), *_strides(change_OB)]
    tensors = [values_OB, levels_OB, keep_OB, change_OB, matrix_BB]
    _launch(
        kernel, rounding, (scales_O, zeros_O), tensors,
        [*sizes, *_of_stack(matrix_BB, 2), *numbers], WIDTH=width, B=_tile(width), **constants,
    )  # fmt: skip
    return change_OB


def _launch(
    kernel: Any, rounding: Rounding, scales: tuple[Tensor, Tensor | None], tensors: list[Tensor],
    numbers: list[float], **constants: Any,
) -> None:  # fmt: skip
    """A program for every 16 rows of every weight."""
    first, (scales_O, zeros_O) = tensors[0], scales
    if not first.numel():
        return
    table = _tensor(rounding.table, first.device) if rounding.table else scales_O
    with torch.cuda.device_of(first):
        kernel[(triton.cdiv(first.shape[-2], ROWS), first.shape[:-2].numel())](
            *tensors, scales_O, scales_O if zeros_O is None else zeros_O, table,
            first.shape[-2], *_of_stack(scales_O, 1), *numbers,
            float(rounding.lowest), float(rounding.highest),
            KIND=KINDS[rounding.kind], LEVELS=(len(rounding.table) + 1) // 2,
            HAS_ZEROS=zeros_O is not None, IS_HALF=rounding.is_half, R=ROWS, num_warps=4,
            **constants,
        )  # fmt: skip


def _strides(*views_OB: Tensor) -> tuple[int, ...]:
    """Of weights, rows and columns, which the views have in common."""
    strides = {view.stride() for view in views_OB}
    assert len(strides) == 1 or not views_OB[0].numel(), f"views of other strides: {strides}"
    return *_of_stack(views_OB[0], 2), views_OB[0].stride(-1)


def _of_stack(tensor: Tensor, ndim: int) -> tuple[int, int]:
    """Strides of the weights, 0 where there is one, and of the dimension behind, of tensors that
    have `ndim` dimensions for a weight."""
    return tensor.stride(0) if tensor.ndim > ndim else 0, tensor.stride(-ndim)


def _tile(width: int) -> int:
    """Columns of a tile, for so many."""
    return min(max(int(triton.next_power_of_2(width)), _INNER), MAX_COLUMNS)


@lru_cache
def _tensor(numbers: tuple[Any, ...], device: torch.device) -> Tensor:
    """Copied to the device once: a copy for every launch would wait for the launch before."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@jit
def _search_kernel(
    weight_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    importance_ptr: tl.tensor,
    tries_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    table_ptr: tl.tensor,
    num_rows: tl.tensor,
    scales_stride: tl.tensor,
    scale_stride: tl.tensor,
    weights_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    importances_stride: tl.tensor,
    importance_stride: tl.tensor,
    width: tl.tensor,
    num_tries: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_HALF: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """The best scale of R rows, tile by tile for one try after another."""
    matrix = tl.program_id(1).to(tl.int64)  # of the stack
    weight_ptr += matrix * weights_stride
    keep_ptr += matrix * weights_stride
    importance_ptr += matrix * importances_stride
    scales_ptr += matrix * scales_stride
    zeros_ptr += matrix * scales_stride
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = rows < num_rows
    columns = tl.arange(0, B).to(tl.int64)
    lowest_tile = tl.zeros((R, B), dtype=tl.float32)
    highest_tile = lowest_tile
    for left in range(0, width, B):
        inside = valid[:, None] & (left + columns < width)[None, :]
        places = rows[:, None] * row_stride + (left + columns)[None, :] * column_stride
        kept = tl.load(keep_ptr + places, mask=inside, other=0).to(tl.int32)
        weight = tl.load(weight_ptr + places, mask=inside & (kept != 0), other=0.0)
        lowest_tile = tl.minimum(lowest_tile, weight)
        highest_tile = tl.maximum(highest_tile, weight)
    least = tl.min(lowest_tile, axis=1)
    most = tl.max(highest_tile, axis=1)
    if HAS_ZEROS:
        widest = tl.div_rn(most - least, highest)
    else:
        widest = tl.div_rn(tl.maximum(most, -least), highest)
    best = tl.zeros((R,), dtype=tl.float32) + float("inf")
    scale = tl.zeros((R,), dtype=tl.float32)
    zero = scale
    for trial in range(num_tries):
        share = tl.load(tries_ptr + 2 * trial)
        tried = stored(widest * share, IS_HALF)
        tried_zero = tl.zeros((R,), dtype=tl.float32)
        if HAS_ZEROS:
            middle = nearest_integer(quotient(-least * (1 + share) * 0.5, tried))
            moved = middle + tl.load(tries_ptr + 2 * trial + 1)
            tried_zero = tl.minimum(tl.maximum(moved, 0.0), highest)
        squares = tl.zeros((R, B), dtype=tl.float32)
        for left in range(0, width, B):
            in_width = left + columns < width
            inside = valid[:, None] & in_width[None, :]
            places = rows[:, None] * row_stride + (left + columns)[None, :] * column_stride
            kept = tl.load(keep_ptr + places, mask=inside, other=0).to(tl.int32)
            weight = tl.load(weight_ptr + places, mask=inside & (kept != 0), other=0.0)
            importance_at = importance_ptr + (left + columns) * importance_stride
            importance = tl.load(importance_at, mask=in_width, other=0.0)
            level = nearest(
                weight, tried[:, None], tried_zero[:, None], table_ptr, lowest, highest,
                KIND, LEVELS,
            )  # fmt: skip
            off = level * tried[:, None] - weight
            squares += off * off * importance[None, :]
        error = tl.sum(squares, axis=1)
        is_better = error < best
        best = tl.where(is_better, error, best)
        scale = tl.where(is_better, tried, scale)
        zero = tl.where(is_better, tried_zero, zero)
    tl.store(scales_ptr + rows * scale_stride, scale, mask=valid)
    if HAS_ZEROS:
        tl.store(zeros_ptr + rows * scale_stride, zero, mask=valid)


@jit
def _eliminate_kernel(
    work_ptr: tl.tensor,
    levels_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    error_ptr: tl.tensor,
    upper_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    table_ptr: tl.tensor,
    num_rows: tl.tensor,
    scales_stride: tl.tensor,
    scale_stride: tl.tensor,
    weights_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    errors_stride: tl.tensor,
    error_row_stride: tl.tensor,
    error_column_stride: tl.tensor,
    uppers_stride: tl.tensor,
    upper_stride: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_HALF: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """Round the columns of R rows from the left, their weights in registers meanwhile."""
    matrix = tl.program_id(1).to(tl.int64)  # of the stack
    work_ptr += matrix * weights_stride
    levels_ptr += matrix * weights_stride
    keep_ptr += matrix * weights_stride
    error_ptr += matrix * errors_stride
    upper_ptr += matrix * uppers_stride
    scales_ptr += matrix * scales_stride
    zeros_ptr += matrix * scales_stride
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = rows < num_rows
    columns = tl.arange(0, B)
    inside = valid[:, None] & (columns < WIDTH)[None, :]
    places = rows[:, None] * row_stride + columns[None, :] * column_stride
    work = tl.load(work_ptr + places, mask=inside, other=0.0)
    scale = tl.load(scales_ptr + rows * scale_stride, mask=valid, other=0.0)
    zero = tl.zeros((R,), dtype=tl.float32)
    if HAS_ZEROS:
        zero = tl.load(zeros_ptr + rows * scale_stride, mask=valid, other=0.0)
    for column in range(WIDTH):
        place = rows * row_stride + column * column_stride
        kept = tl.load(keep_ptr + place, mask=valid, other=0).to(tl.int32)
        pivot = tl.load(upper_ptr + column * upper_stride + column)
        value = column_of(work, columns, column)
        level = nearest(value, scale, zero, table_ptr, lowest, highest, KIND, LEVELS)
        level = tl.where(kept != 0, level, 0.0)
        error_R = tl.div_rn(value - level * scale, pivot)
        row_ptr = upper_ptr + column * upper_stride
        work = pushed_right(work, error_R, row_ptr, columns, column, WIDTH)
    # No column changed after its own turn, so its level and its error can still be told.
    kept_tile = tl.load(keep_ptr + places, mask=inside, other=0).to(tl.int32)
    pivots = tl.load(upper_ptr + columns * (upper_stride + 1), mask=columns < WIDTH, other=1.0)
    levels = nearest(
        work, scale[:, None], zero[:, None], table_ptr, lowest, highest, KIND, LEVELS
    )  # fmt: skip
    levels = tl.where(kept_tile != 0, levels, 0.0)
    error = tl.div_rn(work - levels * scale[:, None], pivots[None, :])
    outputs = rows[:, None] * error_row_stride + columns[None, :] * error_column_stride
    tl.store(levels_ptr + places, levels, mask=inside)
    tl.store(error_ptr + outputs, error, mask=inside)


@jit
def _descend_kernel(
    residual_ptr: tl.tensor,
    levels_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    change_ptr: tl.tensor,
    matrix_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    table_ptr: tl.tensor,
    num_rows: tl.tensor,
    scales_stride: tl.tensor,
    scale_stride: tl.tensor,
    weights_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    changes_stride: tl.tensor,
    change_row_stride: tl.tensor,
    change_column_stride: tl.tensor,
    matrices_stride: tl.tensor,
    matrix_stride: tl.tensor,
    largest: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    WIDTH: tl.constexpr,
    REFITS: tl.constexpr,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_HALF: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """Refit the scales of R rows if asked to, then give each column its best level in turn."""
    weight = tl.program_id(1).to(tl.int64)  # of the stack
    residual_ptr += weight * weights_stride
    levels_ptr += weight * weights_stride
    keep_ptr += weight * weights_stride
    change_ptr += weight * changes_stride
    matrix_ptr += weight * matrices_stride
    scales_ptr += weight * scales_stride
    zeros_ptr += weight * scales_stride
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = rows < num_rows
    columns = tl.arange(0, B)
    inside = valid[:, None] & (columns < WIDTH)[None, :]
    places = rows[:, None] * row_stride + columns[None, :] * column_stride
    levels = tl.load(levels_ptr + places, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + places, mask=inside, other=0.0)
    scale = tl.load(scales_ptr + rows * scale_stride, mask=valid, other=0.0)
    zero = tl.zeros((R,), dtype=tl.float32)
    if HAS_ZEROS:
        zero = tl.load(zeros_ptr + rows * scale_stride, mask=valid, other=0.0)
    step = tl.zeros((R,), dtype=tl.float32)
    if REFITS:
        product = tl.zeros((R, B), dtype=tl.float32)
        for left in range(0, WIDTH, INNER):
            inner = left + tl.arange(0, INNER)
            part = tl.load(
                levels_ptr + rows[:, None] * row_stride + inner[None, :] * column_stride,
                mask=valid[:, None] & (inner < WIDTH)[None, :], other=0.0,
            )  # fmt: skip
            matrix = tl.load(
                matrix_ptr + inner[:, None] * matrix_stride + columns[None, :],
                mask=(inner < WIDTH)[:, None] & (columns < WIDTH)[None, :], other=0.0,
            )  # fmt: skip
            product = tl.dot(part, matrix, product, input_precision="ieee")
        gain = tl.sum(residual * levels, axis=1)
        curvature = tl.sum(product * levels, axis=1)
        wanted = scale + quotient(gain, curvature)
        wanted = tl.minimum(tl.maximum(wanted, -largest), largest)
        step = stored(wanted, IS_HALF) - scale
        step = tl.where(step * (2 * gain - step * curvature) > 0, step, 0.0)
        residual = residual - step[:, None] * product
        scale = scale + step
        tl.debug_barrier()  # all warps have read the scales that are written now
        tl.store(scales_ptr + rows * scale_stride, scale, mask=valid)
    for column in range(WIDTH):
        place = rows * row_stride + column * column_stride
        kept = tl.load(keep_ptr + place, mask=valid, other=0).to(tl.int32)
        now = tl.load(levels_ptr + place, mask=valid, other=0.0)
        pivot = tl.load(matrix_ptr + column * matrix_stride + column)
        move = tl.div_rn(column_of(residual, columns, column), pivot)
        # As one operation, which the compiler then cannot round in another way further down.
        best = tl.fma(now, scale, move)
        new = nearest(best, scale, zero, table_ptr, lowest, highest, KIND, LEVELS)
        new = tl.where(kept != 0, new, 0.0)
        row_ptr = matrix_ptr + column * matrix_stride
        residual = pushed_right(residual, (new - now) * scale, row_ptr, columns, column, WIDTH)
    # As in the elimination: what each column saw at its turn is still there.
    kept_tile = tl.load(keep_ptr + places, mask=inside, other=0).to(tl.int32)
    pivots = tl.load(matrix_ptr + columns * (matrix_stride + 1), mask=columns < WIDTH, other=1.0)
    moves = tl.div_rn(residual, pivots[None, :])
    spread = tl.broadcast_to(scale[:, None], (R, B))
    chosen = nearest(
        tl.fma(levels, spread, moves), spread, zero[:, None], table_ptr, lowest, highest,
        KIND, LEVELS,
    )  # fmt: skip
    chosen = tl.where(kept_tile != 0, chosen, 0.0)
    change = (chosen - levels) * scale[:, None] + levels * step[:, None]
    outputs = rows[:, None] * change_row_stride + columns[None, :] * change_column_stride
    tl.debug_barrier()  # and the levels
    tl.store(levels_ptr + places, chosen, mask=inside)
    tl.store(change_ptr + outputs, change, mask=inside)
