"""The order in which the GPU kernels read a packed 2:4 weight, from a packed file's order and back.

The same numbers in another order, that of the registers of `mma.sp.m16n8k32`: 16 rows make a row
tile, 32 columns of it a tile (16 survivors of each row), and 8 tiles side by side a step of 256
columns. Lane 4g + t of a warp holds rows g and g + 8 of the row tile, and of a tile's 16 survivors
those in places 2t, 2t + 1, 2t + 8 and 2t + 9: register r = 2q + h has row g + 8h, places 8q + 2t
(low half) and 8q + 2t + 1 (high half). What one lane reads of a step lies in pieces of 16 bytes.

    tensor, int32                 what
    values of 16 bits             (O/16, I/256, 8, 32, 4): tile, lane, register
    values of 8 bits              (O/16, I/256, 4, 32, 4): two tiles a piece; word 2j + q of tile j
                                  has registers 2q and 2q + 1: low halves, then high halves
    int4                          (O/16, I/256, 2, 32, 4): four tiles a piece, one a word; register
                                  r in bits 4r (low half) and 16 + 4r (high half)
    nf4                           the same, register r in bits 8r and 8r + 4
    positions                     (O/16, I/256, 32, 4): word w of lane 4g + 2s + k serves tile
                                  2w + s: groups 4k to 4k + 3 of row g in the low half, of row
                                  g + 8 in the high half, i0 | i1 << 2 each
    scales of groups              (O/16, I/256, 8, S): float16 of row g | row g + 8 << 16
    scales of rows                float32 (O), padded to a multiple of 16
    zeros, int16                  (O/16, I/256, 8, S): row g | row g + 8 << 8

int8 is stored as a signed number (with zeros: code - 128). S is 8, 4, 2 or 1 for groups of 32, 64,
128 or more columns. Rows are padded to a multiple of 16 and columns to one of 256.

Shape suffixes: O rows, I columns, K = I / 2 survivors of a row, G groups of scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.errors import InputError

ROWS = 16  # of a row tile

COLUMNS = 256  # of a step

KINDS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
    "int4": torch.uint8,
    "nf4": torch.uint8,
}
"""Type of values -> dtype of the packed file's `weight`; uint8 too for int8 with zeros"""

_PADDING = {"int4": 8, "nf4": 7}
"""Kinds of 4 bits: the code that stands for 0"""

_SIGNED = 0x80  # turns uint8 codes into int8 of code - 128, and back

_NO_POSITIONS = 0x44  # padding: survivors 0 and 1 of two groups

_ORDERED = (4, 8, 9, 12, 13, 14)  # i0 | i1 << 2 with i0 < i1, all that the hardware takes

# Axes: r row tile, h half of it, g row of the half; s step, i piece of a step, j tile of a piece,
# q half of a tile, t lane of a row, b survivor of a pair.
_STORED = "rhgsijqtb"
_ORDERS = {"int4": "rsigtjbqh", "nf4": "rsigtjqhb", 1: "rsigtjqbh", 2: "rsigtjqhb"}
_PIECES = {"int4": (2, 4), "nf4": (2, 4), 1: (4, 2), 2: (8, 1)}
"""Kind, or bytes of a value -> order of axes, and how many pieces of how many tiles"""

# Of positions in bytes: w word, c tile of a word, k half of a tile, p byte of a half.
_POSITIONS = ("rhgswckp", "rsgckwhp")


class Prepared(NamedTuple):
    """A packed weight in the order of the kernels."""

    values: Tensor
    positions: Tensor
    scales: Tensor | None
    zeros: Tensor | None


def scale_width(num_columns: int, group_size: int, has_zeros: bool) -> int:
    """Columns that share a scale in the kernels' order: 0 (a row), 32, 64, 128 or 256.

    Raises:
        InputError: a group size that the kernels do not take.
    """
    if not group_size or group_size >= num_columns:
        return COLUMNS if has_zeros else 0
    if group_size not in (32, 64, 128) and group_size % COLUMNS:
        raise InputError(
            f"packed linear: groups of {group_size} columns on a GPU; use 32, 64, 128, a multiple "
            f"of {COLUMNS}, or one scale a row"
        )
    return min(group_size, COLUMNS)


def prepare(
    kind: str,
    num_columns: int,
    group_size: int,
    weight_OK: Tensor,
    indices: Tensor,
    scales_OG: Tensor | None = None,
    zeros_OG: Tensor | None = None,
) -> Prepared:
    """Bring the tensors of a packed 2:4 layer into the kernels' order, on their own device.

    Args:
        kind: one of `KINDS`.
        num_columns: I, a multiple of 4.
        group_size: columns that share a scale; 0 where a row has one or none.
        weight_OK, indices, scales_OG, zeros_OG: tensors of a packed layer, as docs/formats.md has
            them.

    Raises:
        InputError: tensors that do not belong together, a group size or zeros that the kernels do
            not take, or positions that no 2:4 mask has.

    Cost: a few passes over the packed tensors, with two to four times as much memory meanwhile.
    """
    _check(kind, num_columns, weight_OK, indices, scales_OG, zeros_OG)
    width = scale_width(num_columns, group_size, zeros_OG is not None)
    is_16_bits = weight_OK.element_size() == 2
    stored = weight_OK.view(torch.int16 if is_16_bits else torch.uint8)
    if kind in _PADDING:
        stored = torch.stack((stored & 15, stored >> 4), 2).flatten(1)[:, : num_columns // 2]
    elif kind == "int8" and zeros_OG is not None:
        stored = stored ^ _SIGNED
    stored = _padded(stored, COLUMNS // 2, _PADDING.get(kind, 0))
    form = _form(kind)
    values = _turn(stored, _STORED, _ORDERS[form], _PIECES[form])
    if kind in _PADDING:
        pairs = values.view(-1, 2)
        values = pairs[:, 0] | pairs[:, 1] << 4
    places = len(stored) // ROWS, stored.shape[1] * 2 // COLUMNS
    values = values.view(-1).view(torch.int32).view(*places, -1, 32, 4)
    positions = _turn(_checked_positions(num_columns, indices), *_POSITIONS)
    positions = positions.view(-1).view(torch.int32).view(*places, 32, 4)
    scales = zeros = None
    if scales_OG is not None:
        if width:
            spread = _spread(scales_OG.view(torch.int16), num_columns, group_size, width)
            scales = spread.view(-1).view(torch.int32).view(*places, 8, -1)
        else:
            scales = _padded(scales_OG.float(), 1, 0)[:, 0]
    if zeros_OG is not None:
        given = zeros_OG ^ _SIGNED if kind == "int8" else zeros_OG
        spread = _spread(given, num_columns, group_size, width)
        zeros = spread.view(-1).view(torch.int16).view(*places, 8, -1)
    return Prepared(values, positions, scales, zeros)


def restore(
    kind: str, num_rows: int, num_columns: int, group_size: int, prepared: Prepared
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weight, indices, scales and zeros as `prepare` was given them, bit for bit.

    Unused bits of a row's last byte are 0, as packed files have them.
    """
    has_zeros, num_kept = prepared.zeros is not None, num_columns // 2
    form = _form(kind)
    lanes = prepared.values.contiguous().view(-1)
    lanes = lanes.view(torch.int16 if form == 2 else torch.uint8)
    if kind in _PADDING:
        lanes = torch.stack((lanes & 15, lanes >> 4), 1).view(-1)
    num_tiles = prepared.values.shape[0]
    weight = _turn(lanes.view(num_tiles * ROWS, -1), _ORDERS[form], _STORED, _PIECES[form])
    weight = weight.view(num_tiles * ROWS, -1)[:num_rows, :num_kept].contiguous()
    if kind in _PADDING:
        if num_kept % 2:
            weight = torch.cat((weight, torch.zeros_like(weight[:, :1])), 1)
        weight = weight[:, ::2] | weight[:, 1::2] << 4
    else:
        is_unsigned = kind == "int8" and has_zeros
        weight = weight ^ _SIGNED if is_unsigned else weight.view(KINDS[kind])
    lanes = prepared.positions.contiguous().view(-1).view(torch.uint8)
    indices = _turn(lanes.view(num_tiles * ROWS, -1), *_POSITIONS[::-1])
    indices = indices.view(num_tiles * ROWS, -1)[:num_rows, : -(-num_columns // 8)].contiguous()
    if num_columns % 8:
        indices[:, -1] &= 0x0F
    scales, zeros = prepared.scales, prepared.zeros
    if scales is not None and not scale_width(num_columns, group_size, has_zeros):
        scales = scales[:num_rows, None].to(torch.float32 if kind == "float8" else torch.float16)
    elif scales is not None:
        halves = scales.contiguous().view(-1).view(torch.float16)
        scales = _gathered(halves, num_tiles, num_rows, num_columns, group_size)
    if zeros is not None:
        codes = zeros.contiguous().view(-1).view(torch.uint8)
        zeros = _gathered(codes, num_tiles, num_rows, num_columns, group_size)
        zeros = zeros ^ _SIGNED if kind == "int8" else zeros
    return weight, indices, scales, zeros


def _form(kind: str) -> str | int:
    """Key of `_ORDERS` and `_PIECES`."""
    return kind if kind in _PADDING else KINDS[kind].itemsize


def _turn(rows: Tensor, given: str, wanted: str, pieces: tuple[int, int] = (1, 1)) -> Tensor:
    """A copy of (padded rows, elements) with its axes in another order."""
    sizes = {"r": len(rows) // ROWS, "h": 2, "g": 8, "i": pieces[0], "j": pieces[1], "q": 2,
             "t": 4, "b": 2, "w": 4, "c": 2, "k": 2, "p": 2, "s": -1}  # fmt: skip
    shape = [sizes[axis] for axis in given]
    return rows.reshape(shape).permute([given.index(axis) for axis in wanted]).contiguous()


def _padded(given: Tensor, unit: int, fill: int) -> Tensor:
    """A copy with rows to a multiple of 16 and columns to one of `unit`, filled."""
    num_rows, width = given.shape
    shape = -(-num_rows // ROWS) * ROWS, -(-width // unit) * unit
    full = given.new_full(shape, fill)
    full[:num_rows, :width] = given
    return full


def _spread(part_OG: Tensor, num_columns: int, group_size: int, width: int) -> Tensor:
    """Scales or zeros for each `width` columns, in steps, the two rows of a lane side by side."""
    num_steps = -(-num_columns // COLUMNS)
    if not group_size or group_size >= num_columns:
        part_OG = part_OG.expand(-1, num_steps)
    elif group_size > width:
        part_OG = part_OG.repeat_interleave(group_size // width, 1)[:, :num_steps]
    per_step = COLUMNS // width
    rows = _padded(part_OG, per_step, 0)
    tiles = rows.view(-1, 2, 8, num_steps, per_step)
    return tiles.permute(0, 3, 2, 4, 1).contiguous()


def _gathered(
    part: Tensor, num_tiles: int, num_rows: int, num_columns: int, group_size: int
) -> Tensor:
    """What `_spread` was given, from its elements in a row."""
    num_steps = -(-num_columns // COLUMNS)
    lanes = part.view(num_tiles, num_steps, 8, -1, 2)
    rows = lanes.permute(0, 4, 2, 1, 3).reshape(num_tiles * ROWS, -1)[:num_rows]
    if not group_size or group_size >= num_columns:
        return rows[:, :1].contiguous()
    stride = max(1, group_size // COLUMNS)
    return rows[:, ::stride][:, : -(-num_columns // group_size)].contiguous()


def _checked_positions(num_columns: int, indices: Tensor) -> Tensor:
    """Positions padded to whole steps and row tiles.

    Raises:
        InputError: a pair that does not rise, with which the hardware computes anything.
    """
    padded = _padded(indices, COLUMNS // 8, _NO_POSITIONS)
    if num_columns % 8:  # the upper half of the last byte is no group
        last = indices.shape[1] - 1
        padded[: len(indices), last] = padded[: len(indices), last] & 0x0F | _NO_POSITIONS & 0xF0
    is_ordered = torch.zeros(16, dtype=torch.bool, device=indices.device)
    is_ordered[list(_ORDERED)] = True
    both = is_ordered.unsqueeze(1) & is_ordered
    if not bool(both.flatten()[padded.int()].all()):
        raise InputError("packed linear: positions that no 2:4 mask has; export the model again")
    return padded


def _check(
    kind: str,
    num_columns: int,
    weight_OK: Tensor,
    indices: Tensor,
    scales_OG: Tensor | None,
    zeros_OG: Tensor | None,
) -> None:
    if kind not in KINDS:
        raise InputError(f"packed linear: no kernel for {kind} on a GPU; use {', '.join(KINDS)}")
    if num_columns < 4 or num_columns % 4:
        raise InputError(f"packed linear: {num_columns} columns; 2:4 needs a multiple of 4")
    num_rows, num_kept = len(weight_OK), num_columns // 2
    dtype = torch.uint8 if kind == "int8" and zeros_OG is not None else KINDS[kind]
    shape = num_rows, -(-num_kept // 2) if kind in _PADDING else num_kept
    if weight_OK.dtype != dtype or tuple(weight_OK.shape) != shape:
        raise InputError(
            f"packed linear: weight is {weight_OK.dtype} {tuple(weight_OK.shape)}; {kind} with "
            f"{num_columns} columns needs {dtype} {shape}"
        )
    if tuple(indices.shape) != (num_rows, -(-num_columns // 8)):
        raise InputError(f"packed linear: indices are {tuple(indices.shape)}")
    if (scales_OG is None) != (kind in ("bfloat16", "float16")):
        raise InputError(f"packed linear: {kind} with{'out' if scales_OG is None else ''} scales")
    if zeros_OG is not None and (
        kind not in ("int8", "int4") or bool((zeros_OG > _most(kind)).any())
    ):
        raise InputError(f"packed linear: {kind} takes no such zeros")
    if kind == "float8" and bool(((weight_OK.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise InputError("packed linear: a float8 weight is NaN; quantise the layer again")


def _most(kind: str) -> int:
    """The largest zero that is exact beside the codes in bfloat16."""
    return 127 if kind == "int4" else 255
