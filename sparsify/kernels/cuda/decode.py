"""Few tokens by a packed 2:4 weight: one launch on the sparse tensor cores, no dense weight.

A warp takes 16 rows (or R times 16) and every W-th step of 256 columns; the W warps of a program
add up at the end, always in the same order. Of a step a lane first reads all its words, 16 bytes at
a time, and then computes tile after tile: survivors become bfloat16 (or float16) in registers, the
inputs come from the cache in their natural order, `mma.sp` multiplies. Scales are applied to the
float32 sums of each group, so that no weight is rounded but NF4's table.

Shape suffixes: O rows, I columns, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.cuda._decode_triton import decode_kernel
from sparsify.kernels.cuda.layout import COLUMNS, ROWS, Prepared, scale_width
from sparsify.kernels.cuda.ptx import sparse_product_ptx
from sparsify.kernels.triton_jit import require_triton

MOST_TOKENS = 64
"""of one launch"""

_WIDE_ROWS = 14336  # from here on a warp takes two row tiles: inputs are read half as often

_NARROW_ROWS = 2048  # up to here programs are too few to keep memory busy with 8 warps each


def decode(
    inputs_TI: Tensor,
    prepared: Prepared,
    bias_O: Tensor | None,
    kind: str,
    num_rows: int,
    group_size: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + bias, (T, O), for at most 64 tokens.

    Args:
        inputs_TI: bfloat16 or float16, of the weight's dtype if that is one of them.
        prepared: of `layout.prepare`.
        bias_O: any float type, or None.
        kind: one of `layout.KINDS`.
        num_rows: O.
        group_size: columns that share a scale; 0 where a row has one or none.
        out_dtype: of the result; None for that of the inputs.

    Raises:
        InputError: Triton is not installed.

    Cost: one launch. Reads the packed weight once, and each program all inputs, from the cache.
    """
    require_triton()
    num_tokens, num_columns = inputs_TI.shape
    output_TO = inputs_TI.new_empty(num_tokens, num_rows, dtype=out_dtype or inputs_TI.dtype)
    inputs_TI = inputs_TI.contiguous()
    if inputs_TI.data_ptr() % 4:
        inputs_TI = inputs_TI.clone()
    values, positions, scales, zeros = prepared
    width = scale_width(num_columns, group_size, zeros is not None) if scales is not None else 0
    is_half = inputs_TI.dtype == torch.float16
    tiles, row_tiles, warps = plan(num_tokens, len(values), values.shape[1])
    unused = values  # in place of a pointer that is not read
    with torch.cuda.device_of(inputs_TI):
        decode_kernel[(len(values) // row_tiles,)](
            inputs_TI.view(torch.int32), values, positions, unused if scales is None else scales,
            unused if zeros is None else zeros, unused if bias_O is None else bias_O, output_TO,
            num_tokens, num_rows, num_columns, values.shape[1], KIND=kind, IS_HALF=is_half,
            WIDTH=width, HAS_ROW_SCALES=scales is not None and not width,
            HAS_ZEROS=zeros is not None, HAS_BIAS=bias_O is not None,
            CUTS_COLUMNS=num_columns % COLUMNS != 0, CUTS_STEPS=values.shape[1] % warps != 0,
            N=tiles, R=row_tiles, W=warps, FIRST=sparse_product_ptx(0, is_half),
            SECOND=sparse_product_ptx(1, is_half), num_warps=warps,
        )  # fmt: skip
    return output_TO


def plan(num_tokens: int, num_row_tiles: int, num_steps: int) -> tuple[int, int, int]:
    """Tiles of 8 tokens (a power of two), row tiles of a warp, and warps of a program."""
    tiles = 1
    while 8 * tiles < num_tokens:
        tiles *= 2
    is_wide = num_row_tiles * ROWS >= _WIDE_ROWS and num_row_tiles % 2 == 0 and tiles <= 2
    warps = 16 if num_row_tiles * ROWS <= _NARROW_ROWS else 8
    while warps > 1 and warps // 2 >= num_steps:
        warps //= 2
    return tiles, 2 if is_wide else 1, warps
