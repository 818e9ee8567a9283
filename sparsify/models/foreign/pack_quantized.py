"""pack-quantized: codes of 4 or 8 bits in int32 words along a row, with scales (W4A16, W8A16).

Of each layer: `weight_packed` int32 (O, I * bits / 32), codes + 2^(bits-1), the first in the lowest
bits; `weight_scale` (O, G); `weight_shape` [O, I]; asymmetric ones `weight_zero_point`, packed the
same way down the rows, int32 (O * bits / 32, G); reordered ones `weight_g_idx`, every column's
group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.models.foreign._base import (
    Args,
    Parts,
    Reader,
    check_scales,
    columns_of,
    meaning,
    need_args,
    require,
    stored_shape,
    unpack_words,
)


def _shape(parts: Parts, args: Args | None) -> tuple[int, int]:
    args = need_args(parts, args)
    num_rows, num_columns = shape = stored_shape(parts["weight_shape"])
    per_word = 32 // args.num_bits
    require(parts["weight_packed"], ("I32",), (num_rows, -(-num_columns // per_word)))
    packed_zeros = "weight_zero_point" in parts and parts["weight_zero_point"].dtype == "I32"
    check_scales(parts, args, shape, zeros=not packed_zeros)
    if packed_zeros:
        width = (-(-num_rows // per_word), args.num_groups(num_columns))
        require(parts["weight_zero_point"], ("I32",), width)
    return shape


def _decode(parts: Parts, args: Args | None, shape: tuple[int, int]) -> Tensor:
    args = need_args(parts, args)
    num_rows, num_columns = shape
    half = 2 ** (args.num_bits - 1)
    codes_OI = unpack_words(parts["weight_packed"].read(), args.num_bits, num_columns).short()
    zero = None
    if "weight_zero_point" in parts and not args.symmetric:
        zero = parts["weight_zero_point"].read()
        if zero.dtype == torch.int32:
            zero = unpack_words(zero.t(), args.num_bits, num_rows).t().short() - half
    scale, group_I = parts["weight_scale"].read(), columns_of(parts, args, num_columns)
    return meaning(codes_OI - half, scale, zero, args, group_I)


READER = Reader(
    ("pack-quantized",), "weight_packed", ("weight_packed", "weight_scale", "weight_shape"),
    ("weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point"), _shape, _decode,
)  # fmt: skip
