"""The order in which the CPU kernels read a packed 2:4 weight, from a packed file's order and back.

The same numbers in another order: 8 rows make a block, 64 columns of it a chunk, and a chunk is
one piece of memory: positions first, then values. A chunk has 16 steps, one for each group of 4
columns, and 16 lanes: lane 2r + k is survivor k of row r. So one 512-bit register (or two of 256)
holds what 8 rows have in one group of columns, and each of its 128-bit lanes serves two rows.

    bytes        what
    64           positions: for each lane 32 bits, step s in bits 2s and 2s + 1
    16 x 64      float32: step after step, lane after lane
    8 x 64       bfloat16: for each two steps a 32-bit number of each lane, the first step low
    16 x 32      float16: step after step
    16 x 16      int8, float8: step after step
    2 x 64       int4, nf4: for 8 steps each, 32 bits of each lane, the first step highest; int4
                 as a signed number, stored code - 8

Scales and zeros are (B, G, 8): the 8 rows of a block side by side. Rows are padded to a multiple
of 8 and columns to one of 64, with values that are 0; nothing else is added.

Shape suffixes: O rows, I columns, K = I / 2 survivors of a row, G groups of scales, B blocks,
C chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.errors import InputError

ROWS = 8  # of a block

COLUMNS = 64  # of a chunk

_STEPS = 16  # of a chunk

_META_BYTES = 64

_NO_POSITIONS = 0x44  # padding: survivors 0 and 1 of two groups

KINDS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
    "int4": torch.uint8,
    "nf4": torch.uint8,
}
"""Type of values -> dtype of the packed file's `weight`; the order is that of source/job.h."""

WITH_GROUPS = ("int8", "int4", "nf4")

_PADDING_CODE = {"int4": 0x88, "nf4": 0x77}  # two codes that stand for 0


class Prepared(NamedTuple):
    """A packed weight in the order of the kernels."""

    blocks_BC: Tensor
    """uint8 (B, C, bytes of a chunk)"""
    scales_BG8: Tensor | None
    """float16, or float32 for float8"""
    zeros_BG8: Tensor | None
    """uint8"""


def chunk_bytes(kind: str) -> int:
    """Bytes of a chunk: 64 columns of 8 rows."""
    bits = 4 if kind in ("int4", "nf4") else 8 * KINDS[kind].itemsize
    return _META_BYTES + _STEPS * 2 * ROWS * bits // 8


def prepare(
    kind: str,
    num_columns: int,
    weight_OK: Tensor,
    indices: Tensor,
    scales_OG: Tensor | None = None,
    zeros_OG: Tensor | None = None,
) -> Prepared:
    """Bring the tensors of a packed 2:4 layer into the kernels' order; a copy of the same size.

    Args:
        kind: one of `KINDS`.
        num_columns: I, a multiple of 4.
        weight_OK: survivors, (O, K) of the kind's dtype; int4 and nf4 uint8 (O, ceil(K / 2)), the
            first code in the low nibble.
        indices: uint8 (O, ceil(I / 8)): for each group of 4 columns i0 | i1 << 2, two groups a
            byte, the first in the low nibble.
        scales_OG: (O, G): float16 for int8, int4 and nf4, float32 (O, 1) for float8; else None.
        zeros_OG: uint8 (O, G) of int8 and int4, where weight = (code - zero) * scale. Without them
            code 8 of int4 stands for 0.

    Raises:
        InputError: shapes or dtypes that do not belong together, or a float8 NaN.

    Cost: a few passes over the packed tensors, with as much memory again.
    """
    _check(kind, num_columns, weight_OK, indices, scales_OG, zeros_OG)
    num_rows = len(weight_OK)
    num_blocks, num_chunks = -(-num_rows // ROWS), -(-num_columns // COLUMNS)
    meta = _padded(indices, num_blocks * ROWS, num_chunks * 8, _NO_POSITIONS)
    if num_columns % 8:  # the upper half of the last byte is no group
        last = indices.shape[1] - 1
        meta[:num_rows, last] = meta[:num_rows, last] & 0x0F | 0x40
    parts = [_split_pairs(meta, 2).view(torch.uint8).view(num_blocks, ROWS, 2, num_chunks, 4)]
    parts[0] = parts[0].permute(0, 3, 1, 2, 4).reshape(num_blocks, num_chunks, _META_BYTES)
    stored = weight_OK.view(torch.uint8) if weight_OK.dtype != torch.uint8 else weight_OK
    width = num_chunks * (chunk_bytes(kind) - _META_BYTES) // ROWS
    fill = _PADDING_CODE.get(kind, 0)
    values = _padded(stored, num_blocks * ROWS, width, fill)
    if kind in _PADDING_CODE and num_columns // 2 % 2:  # half a byte is no code
        last = weight_OK.shape[1] - 1
        values[:num_rows, last] = values[:num_rows, last] & 0x0F | fill & 0xF0
    if kind in _PADDING_CODE:
        lanes = (
            _split_pairs(values, 4).view(torch.uint8).view(num_blocks, ROWS, 2, num_chunks, 2, 4)
        )
        if kind == "int4":
            lanes = lanes ^ 0x88
        lanes = (lanes << 4 | lanes >> 4).flip(-1).permute(0, 3, 4, 1, 2, 5)
    else:
        size = KINDS[kind].itemsize
        steps = 2 if kind == "bfloat16" else 1
        lanes = values.view(num_blocks, ROWS, num_chunks, _STEPS // steps, steps, 2, size)
        lanes = lanes.permute(0, 2, 3, 1, 5, 4, 6)
    parts.append(lanes.reshape(num_blocks, num_chunks, -1))
    scales, zeros = (
        None if given is None else _padded(given, num_blocks * ROWS, given.shape[1], 0)
        .view(num_blocks, ROWS, -1).transpose(1, 2).contiguous()
        for given in (scales_OG, zeros_OG)
    )  # fmt: skip
    return Prepared(torch.cat(parts, dim=2), scales, zeros)


def restore(
    kind: str, num_rows: int, num_columns: int, prepared: Prepared
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weight, indices, scales and zeros as `prepare` was given them, bit for bit.

    Unused bits of a row's last byte are 0, as packed files have them.
    """
    blocks = prepared.blocks_BC
    num_blocks, num_chunks = blocks.shape[:2]
    meta = blocks[..., :_META_BYTES].reshape(num_blocks, num_chunks, ROWS, 2, 4)
    meta = _join_pairs(meta.permute(0, 2, 3, 1, 4).contiguous().view(torch.int32), 2)
    indices = meta[:num_rows, : -(-num_columns // 8)].contiguous()
    if num_columns % 8:
        indices[:, -1] &= 0x0F
    lanes = blocks[..., _META_BYTES:]
    num_kept = num_columns // 2
    if kind in _PADDING_CODE:
        lanes = lanes.reshape(num_blocks, num_chunks, 2, ROWS, 2, 4).permute(0, 3, 4, 1, 2, 5)
        lanes = (lanes << 4 | lanes >> 4).flip(-1).contiguous()
        if kind == "int4":
            lanes = lanes ^ 0x88
        values = _join_pairs(lanes.view(torch.int32), 4)
        weight = values[:num_rows, : -(-num_kept // 2)].contiguous()
        if num_kept % 2:
            weight[:, -1] &= 0x0F
    else:
        size = KINDS[kind].itemsize
        steps = 2 if kind == "bfloat16" else 1
        lanes = lanes.reshape(num_blocks, num_chunks, _STEPS // steps, ROWS, 2, steps, size)
        values = lanes.permute(0, 3, 1, 2, 5, 4, 6).reshape(num_blocks * ROWS, -1)
        weight = values[:num_rows, : num_kept * size].contiguous().view(KINDS[kind])
    scales, zeros = (
        None if given is None else given.transpose(1, 2)
        .reshape(num_blocks * ROWS, -1)[:num_rows].contiguous()
        for given in (prepared.scales_BG8, prepared.zeros_BG8)
    )  # fmt: skip
    return weight, indices, scales, zeros


def _split_pairs(numbers: Tensor, bits: int) -> Tensor:
    """Every second small number of each 8 bytes: uint8 (R, 8 n) to int32 (R / 8, 8, 2, n).

    Args:
        numbers: small numbers of `bits` bits, the lowest first; survivors 0 and 1 in turn.
        bits: 2 or 4.
    """
    words = numbers.view(torch.int64)
    both = torch.stack((words, words >> bits), dim=1)
    for width, mask in _FOLDS[bits]:
        both = (both | both >> width) & mask if width else both & mask
    halves = both.view(torch.int32)[..., ::2].contiguous()  # little-endian: the low halves
    return halves.view(-1, ROWS, 2, words.shape[1])


def _join_pairs(halves: Tensor, bits: int) -> Tensor:
    """What `_split_pairs` was given, uint8 (R, 8 n), from int32 (R / 8, 8, 2, n, ...)."""
    both = halves.reshape(halves.shape[0] * ROWS, 2, -1).to(torch.int64) & 0xFFFFFFFF
    for (width, _), (_, mask) in zip(_FOLDS[bits][:0:-1], _FOLDS[bits][-2::-1], strict=True):
        both = (both | both << width) & mask
    return (both[:, 0] | both[:, 1] << bits).contiguous().view(torch.uint8)


_FOLDS = {
    2: ((0, 0x3333333333333333), (2, 0x0F0F0F0F0F0F0F0F), (4, 0x00FF00FF00FF00FF),
        (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)),
    4: ((0, 0x0F0F0F0F0F0F0F0F), (4, 0x00FF00FF00FF00FF),
        (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)),
}  # fmt: skip
"""Shifts and masks that bring every second number of 64 bits together, step by step"""


def _padded(given: Tensor, num_rows: int, width: int, fill: int) -> Tensor:
    """A copy with more rows and columns, which hold `fill`."""
    full = given.new_full((num_rows, width), fill)
    full[: given.shape[0], : given.shape[1]] = given
    return full


def _check(
    kind: str,
    num_columns: int,
    weight_OK: Tensor,
    indices: Tensor,
    scales_OG: Tensor | None,
    zeros_OG: Tensor | None,
) -> None:
    if kind not in KINDS:
        raise InputError(f"packed linear: unknown kind {kind}; use one of: {', '.join(KINDS)}")
    if num_columns < 4 or num_columns % 4:
        raise InputError(f"packed linear: {num_columns} columns; 2:4 needs a multiple of 4")
    num_rows, num_kept = len(weight_OK), num_columns // 2
    width = -(-num_kept // 2) if kind in _PADDING_CODE else num_kept
    wanted: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]]
    wanted = {"weight": (weight_OK, KINDS[kind], (num_rows, width)),
              "indices": (indices, torch.uint8, (num_rows, -(-num_columns // 8)))}  # fmt: skip
    if kind in WITH_GROUPS or kind == "float8":
        if scales_OG is None:
            raise InputError(f"packed linear: {kind} values need scales")
        dtype, groups = (torch.float32, 1) if kind == "float8" else (torch.float16, None)
        wanted["scales"] = (scales_OG, dtype, (num_rows, groups or scales_OG.shape[-1]))
    elif scales_OG is not None:
        raise InputError(f"packed linear: {kind} values take no scales")
    if zeros_OG is not None:
        if kind not in ("int8", "int4") or scales_OG is None:
            raise InputError(f"packed linear: {kind} values take no zeros")
        wanted["zeros"] = (zeros_OG, torch.uint8, tuple(scales_OG.shape))
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise InputError(
                f"packed linear: {name} is {tensor.dtype} {tuple(tensor.shape)}; {kind} with "
                f"{num_columns} columns needs {dtype} {shape}"
            )
    if kind == "float8" and ((weight_OK.view(torch.uint8) & 0x7F) == 0x7F).any():
        raise InputError("packed linear: a float8 weight is NaN; quantise the layer again")
