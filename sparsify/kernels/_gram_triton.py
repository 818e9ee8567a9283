"""X^T X of half-precision inputs on a GPU's tensor cores, upper tiles only.

Shape suffixes: T tokens, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.triton_jit import jit, require_triton, tl, triton

_TILE = 128  # columns of the sum by columns of the sum that one program adds up

_STEP = 64  # tokens per step

_GROUP = 8  # tile rows that are gone through together


def add_upper_(sum_II: Tensor, inputs_TI: Tensor, tile: int = _TILE, step: int = _STEP) -> None:
    """See `gram.add_gram_`; tiles that the diagonal cuts are added whole.

    Args:
        sum_II: float32 (I, I), contiguous.
        inputs_TI: float16 or bfloat16 (T, I).
        tile: width of a tile, a power of two from 16.
        step: tokens per step, a power of two from 16.

    Raises:
        InputError: Triton is not installed.
    """
    require_triton()
    inputs_TI = inputs_TI.contiguous()
    num_tokens, num_columns = inputs_TI.shape
    if not inputs_TI.numel():
        return
    num_tiles = triton.cdiv(num_columns, tile)
    with torch.cuda.device_of(inputs_TI):
        _gram_kernel[(num_tiles * num_tiles,)](
            inputs_TI, sum_II, num_tokens, num_columns, TILE=tile, STEP=step, GROUP=_GROUP,
            num_warps=8, num_stages=3,
        )  # fmt: skip


@jit
def _tile_of(program: tl.tensor, num_tiles: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """Tile row and tile column of a program: down the rows of a group, column after column.

    Programs that run at one time, one for each multiprocessor, then read the same few columns of
    the inputs, which the cache holds: 132 of them read 25 tiles' columns where a row of 112 tiles
    takes 113.
    """
    first = program // (GROUP * num_tiles) * GROUP
    num_rows = min(num_tiles - first, GROUP)
    place = program - first * num_tiles
    return first + place % num_rows, place // num_rows


@jit
def _gram_kernel(
    inputs_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_columns: tl.tensor,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """One tile of the sum, `_tile_of` program_id(0)."""
    tile_row, tile_column = _tile_of(tl.program_id(0), tl.cdiv(num_columns, TILE), GROUP)
    if tile_row <= tile_column:
        rows = tile_row * TILE + tl.arange(0, TILE)
        columns = tile_column * TILE + tl.arange(0, TILE)
        tokens = tl.arange(0, STEP)
        products = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, num_tokens, STEP):
            # 64-bit: tokens times columns exceed 2^31 in large batches.
            token = (start + tokens).to(tl.int64)
            is_token = token < num_tokens
            left = tl.load(
                inputs_ptr + token[None, :] * num_columns + rows[:, None],
                mask=is_token[None, :] & (rows < num_columns)[:, None],
                other=0.0,
            )
            right = tl.load(
                inputs_ptr + token[:, None] * num_columns + columns[None, :],
                mask=is_token[:, None] & (columns < num_columns)[None, :],
                other=0.0,
            )
            products = tl.dot(left, right, products)
        places = sum_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        inside = (rows < num_columns)[:, None] & (columns < num_columns)[None, :]
        tl.store(places, tl.load(places, mask=inside, other=0.0) + products, mask=inside)
