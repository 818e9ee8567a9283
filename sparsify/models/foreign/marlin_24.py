"""marlin-24: 2:4 weights in 4 or 8 bits in the order in which a GPU kernel of 2024 read them.

Of each layer, with K = I / 2 kept values of a row:

- `weight_packed` int32 (K / 16, O * bits / 2): codes + 2^(bits-1) of the matrix (K, O) of kept
  values. Its tiles of 16 x 16 lie one after another, row by row; every 1024 codes, which are four
  tiles, are permuted (`_order`); then they lie in words, the first in the lowest bits.
- `meta` int16 (I / 32, 2 O): of every group of four columns the places of its two kept values,
  four bits, the lower place in the lower two; four groups a word; and the words of the matrix
  (O, I / 16) in the order of CUTLASS (`_meta_places`).
- `scale_packed` float16 (G, O), G is I / 128 or 1. Where groups are shorter than K, every 64
  numbers are permuted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.models.foreign._base import Args, Parts, Reader, meaning, need_args, unpack_words

_TILE = 16


def _shape(parts: Parts, args: Args | None) -> tuple[int, int]:
    args, packed = need_args(parts, args), parts["weight_packed"]
    if packed.dtype != "I32" or len(packed.shape) != 2 or args.type != "int":
        raise packed.wrong("a matrix of I32 words of integers")
    num_rows, num_columns = packed.shape[1] * 2 // args.num_bits, packed.shape[0] * 2 * _TILE
    if packed.shape[1] * 2 % args.num_bits or num_rows % 64 or not num_rows or not num_columns:
        raise packed.wrong(f"whole tiles of 64 outputs in {args.num_bits} bits")
    num_groups = args.num_groups(num_columns)
    for name, kind, shape in (
        ("scale_packed", "F16", (num_groups, num_rows)),
        ("meta", "I16", (num_columns // 32, num_rows * 2)),
    ):
        if parts[name].dtype != kind or parts[name].shape != shape:
            raise parts[name].wrong(f"{shape} of {kind}")
    if args.strategy == "tensor" or (args.group_size and num_columns % args.group_size):
        raise InputError(
            f"tensor {packed.name}: strategy {args.strategy} with groups of {args.group_size} does "
            f"not fit {num_columns} columns of marlin-24"
        )
    return num_rows, num_columns


def _decode(parts: Parts, args: Args | None, shape: tuple[int, int]) -> Tensor:
    args = need_args(parts, args)
    num_rows, num_columns = shape
    num_kept = num_columns // 2
    words = parts["weight_packed"].read()
    stored = unpack_words(words, args.num_bits, num_rows * _TILE).reshape(-1, 1024)
    codes = torch.empty_like(stored)
    codes[:, _order(args.num_bits)] = stored
    tiles = codes.view(num_kept // _TILE, num_rows // _TILE, _TILE, _TILE)
    codes_KO = tiles.permute(0, 2, 1, 3).reshape(num_kept, num_rows)
    kept_OK = codes_KO.t().short() - 2 ** (args.num_bits - 1)
    dense_OI = torch.zeros(shape, dtype=torch.int16)
    dense_OI.scatter_(1, _columns(parts, shape), kept_OK)
    scale_GO = parts["scale_packed"].read()
    if args.strategy == "group" and (args.group_size or 0) < num_kept:
        mixed = scale_GO.reshape(-1, 64)
        plain = torch.empty_like(mixed)
        plain[:, _scale_order()] = mixed
        scale_GO = plain.view(scale_GO.shape)
    return meaning(dense_OI, scale_GO.t(), None, args)


def _columns(parts: Parts, shape: tuple[int, int]) -> Tensor:
    """int64 (O, K): the column of each kept value."""
    num_rows, num_columns = shape
    words = parts["meta"].read().flatten()[_meta_places(num_rows, num_columns // 16)]
    places = torch.arange(0, 16, 2)
    pairs = ((words.int()[..., None] >> places) & 3).reshape(num_rows, num_columns // 4, 2)
    wrong = (pairs[..., 0] >= pairs[..., 1]).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise InputError(
            f"tensor {parts['meta'].name}: row {row}, group {group} has the places "
            f"{pairs[row, group].tolist()}, not two different ones in order"
        )
    starts = torch.arange(0, num_columns, 4)[:, None]
    return (pairs + starts).reshape(num_rows, num_columns // 2)


def _order(bits: int) -> Tensor:
    """int64 (1024,): of each stored code, which of the four tiles' codes it is.

    A warp's thread i holds of the tensor core's operand the rows 2 (i mod 4), the next, and the
    same eight further down; its columns go by i / 4; and the kernel takes the even ones first.
    """
    thread = torch.arange(32).view(32, 1, 1, 1)
    column = torch.arange(4).view(1, 4, 1, 1)
    half = torch.arange(2).view(1, 1, 2, 1)
    step = torch.arange(4).view(1, 1, 1, 4)
    row = 2 * (thread % 4) + step % 2 + 8 * (step // 2)
    tile_column = 8 * (thread // 4 % 2) + 4 * half + column
    order = 256 * (thread // 8) + 16 * row + tile_column
    per_word = 32 // bits
    places = torch.arange(per_word)
    return order.reshape(-1, per_word)[:, torch.cat((places[::2], places[1::2]))].flatten()


def _scale_order() -> Tensor:
    """int64 (64,): of each stored scale, which of 64 outputs it is of."""
    pairs = torch.arange(64).view(8, 2, 4)
    return pairs.transpose(1, 2).flatten()


def _meta_places(num_rows: int, num_words: int) -> Tensor:
    """int64 (O, I / 16): where each word of the positions is stored.

    Rows are dealt out within each 64 of them, the blocks of 2 x 2 that result are transposed, and
    columns are stored in pairs.
    """
    row = torch.arange(num_rows)[:, None].expand(-1, num_words)
    column = torch.arange(num_words).expand(num_rows, -1)
    dealt = row // 64 * 64 + row % 64 // 8 * 4 + row % 4 // 2 * 32 + row % 2 * 2 + row % 8 // 4
    turn = (column % 2) - (dealt % 2)  # 1, -1: across the diagonal; 0: on it
    dealt, column = dealt + turn, column - turn
    return column // 2 * (2 * num_rows) + dealt * 2 + column % 2


READER = Reader(
    ("marlin-24",), "scale_packed", ("weight_packed", "scale_packed", "meta"), (), _shape, _decode
)
