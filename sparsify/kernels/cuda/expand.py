"""Some rows of a packed 2:4 weight as a dense matrix, for products that are worth it.

A program writes 16 rows of 256 columns; a lane holds whole groups of four, as `layout` has them.
Values times scales are float32 and rounded once, as in the dense model: the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.cuda.layout import ROWS, Prepared, scale_width
from sparsify.kernels.triton_jit import jit, require_triton, tl, triton
from sparsify.packed.layer import NF4


def expand(
    prepared: Prepared,
    kind: str,
    num_columns: int,
    group_size: int,
    rows: slice,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight of some rows.

    Args:
        prepared: of `layout.prepare`.
        kind: one of `layout.KINDS`.
        num_columns: I.
        group_size: columns that share a scale; 0 where a row has one or none.
        rows: of the weight; the first is a multiple of 16.
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        (rows, I).

    Cost: one launch; reads the rows' packed bytes and writes the dense ones.
    """
    require_triton()
    values, positions, scales, zeros = prepared
    num_rows = rows.stop - rows.start
    dense_RI = values.new_empty(num_rows, num_columns, dtype=dtype)
    width = scale_width(num_columns, group_size, zeros is not None) if scales is not None else 0
    first, steps = rows.start // ROWS, values.shape[1]
    unused = values  # in place of a pointer that is not read
    with torch.cuda.device_of(values):
        expand_kernel[(triton.cdiv(num_rows, ROWS), steps)](
            values, positions, unused if scales is None else scales,
            unused if zeros is None else zeros, dense_RI, first, num_rows, num_columns,
            KIND=kind, WIDTH=width, HAS_ROW_SCALES=scales is not None and not width,
            HAS_ZEROS=zeros is not None, TABLE=NF4, num_warps=4,
        )  # fmt: skip
    return dense_RI


@jit
def stored_pair(
    values_ptr: tl.tensor, j: tl.tensor, lane: tl.tensor, r: tl.constexpr,
    KIND: tl.constexpr, TABLE: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Both values of register `r` of each tile and lane, float32, without zeros and scales."""
    if KIND == "int4" or KIND == "nf4":
        word = tl.load(values_ptr + (j // 4 * 32 + lane) * 4 + j % 4)
        if KIND == "int4":
            return ((word >> (4 * r)) & 15).to(tl.float32), ((word >> (4 * r + 16)) & 15).to(
                tl.float32
            )
        first = (word >> (8 * r)) & 15
        second = (word >> (8 * r + 4)) & 15
        low = tl.zeros(word.shape, tl.float32)
        high = tl.zeros(word.shape, tl.float32)
        for code in tl.static_range(16):
            low = tl.where(first == code, TABLE[code], low)
            high = tl.where(second == code, TABLE[code], high)
        return low, high
    if KIND == "int8" or KIND == "float8":
        word = tl.load(values_ptr + (j // 2 * 32 + lane) * 4 + j % 2 * 2 + r // 2)
        first = (word >> (8 * (r % 2))) & 255
        second = (word >> (8 * (r % 2) + 16)) & 255
        if KIND == "int8":
            return ((first ^ 128) - 128).to(tl.float32), ((second ^ 128) - 128).to(tl.float32)
        return float8_value(first), float8_value(second)
    word = tl.load(values_ptr + (j * 32 + lane) * 4 + r)
    if KIND == "float16":
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@jit
def float8_value(byte: tl.tensor) -> tl.tensor:
    """float32 of an e4m3 byte."""
    bits = byte & 0x7F
    normal = ((bits << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(bits < 8, bits.to(tl.float32) * 0.001953125, normal)  # m / 8 * 2^-6
    return tl.where(byte >= 128, -magnitude, magnitude)


@jit
def rounded(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """To nearest even, also in the interpreter, which cuts bfloat16 off."""
    if tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return value.to(DTYPE)


@jit
def expand_kernel(
    values_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    dense_ptr: tl.tensor,
    first: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    TABLE: tl.constexpr,
) -> None:
    """Row tile first + program_id(0), step program_id(1)."""
    PIECES: tl.constexpr = 2 if KIND == "int4" or KIND == "nf4" else (
        4 if KIND == "int8" or KIND == "float8" else 8
    )  # fmt: skip
    GROUPS: tl.constexpr = 256 // WIDTH if WIDTH else 1
    element = tl.arange(0, 256)
    lane = element % 32
    j = element // 32
    row_tile = tl.program_id(0)
    step = tl.program_id(1)
    place = (first + row_tile).to(tl.int64) * tl.num_programs(1) + step
    for r in tl.static_range(4):
        row = row_tile * 16 + lane // 4 + 8 * (r % 2)
        column = step * 256 + j * 32 + r // 2 * 16 + lane % 4 * 4
        v0, v1 = stored_pair(values_ptr + place * (128 * PIECES), j, lane, r, KIND, TABLE)
        if WIDTH:
            at = (place * 8 + lane // 4) * GROUPS + j * GROUPS // 8
            zero = tl.zeros((256,), tl.float32)
            if HAS_ZEROS:
                code = (tl.load(zeros_ptr + at).to(tl.int32) >> (8 * (r % 2))) & 255
                zero = ((code ^ 128) - 128 if KIND == "int8" else code).to(tl.float32)
            elif KIND == "int4":
                zero += 8
            bits = (tl.load(scales_ptr + at) >> (16 * (r % 2))).to(tl.int16)
            scale = bits.to(tl.float16, bitcast=True).to(tl.float32)
            v0 = (v0 - zero) * scale + 0.0  # no -0.0, as in sparsify/packed/layer.py
            v1 = (v1 - zero) * scale + 0.0
        if HAS_ROW_SCALES:
            scale = tl.load(scales_ptr + (first + row_tile) * 16 + lane // 4 + 8 * (r % 2))
            zero8 = 8.0 if KIND == "int4" else 0.0
            v0 = (v0 - zero8) * scale + 0.0
            v1 = (v1 - zero8) * scale + 0.0
        word = tl.load(
            positions_ptr + place * 128 + (lane // 4 * 4 + j % 2 * 2 + r // 2) * 4 + j // 2
        )
        nibble = (word >> (16 * (r % 2) + lane % 4 * 4)) & 15
        i0 = nibble & 3
        i1 = nibble >> 2
        c0 = tl.where(i0 == 0, v0, 0.0)
        c1 = tl.where(i0 == 1, v0, tl.where(i1 == 1, v1, 0.0))
        c2 = tl.where(i0 == 2, v0, tl.where(i1 == 2, v1, 0.0))
        c3 = tl.where(i1 == 3, v1, 0.0)
        four = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (256, 4))
        dense_ptrs = dense_ptr + (row.to(tl.int64) * (num_columns // 4) * 4)[:, None]
        dense_ptrs += column[:, None] + tl.arange(0, 4)[None, :]
        inside = (row < num_rows)[:, None] & (column < num_columns)[:, None]
        tl.store(dense_ptrs, rounded(four, dense_ptr.dtype.element_ty), mask=inside)
