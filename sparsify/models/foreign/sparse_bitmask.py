"""sparse-24-bitmask and sparse-bitmask: the kept values, and a bit a weight that says where.

Of each layer: `compressed`, the kept values row after row, (O, I / 2) of 2:4 and one-dimensional
of unstructured ones; `bitmask` uint8 (O, ceil(I / 8)), column i in bit i mod 8 of byte i / 8;
`shape` [O, I]; unstructured ones `row_offsets`, each row's first place. Values may be codes in
float8 or int8, with `weight_scale` as in the formats of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.masks.bits import unpack_bits
from sparsify.models.foreign._base import (
    SCALES,
    Args,
    Parts,
    Reader,
    check_scales,
    meaning,
    need_args,
    require,
    stored_shape,
)


def _shape(parts: Parts, args: Args | None) -> tuple[int, int]:
    num_rows, num_columns = shape = stored_shape(parts["shape"])
    require(parts["bitmask"], ("U8",), (num_rows, -(-num_columns // 8)))
    values = parts["compressed"]
    if len(values.shape) == 2:
        require(values, (*SCALES, "I8", "F8_E4M3"), (num_rows, num_columns // 2))
    elif len(values.shape) != 1:
        raise values.wrong("a row of values, or half of the columns of each row")
    if "weight_scale" in parts:
        check_scales(parts, need_args(parts, args), shape)
    elif values.dtype not in SCALES:
        raise values.wrong(f"{' or '.join(SCALES)}, for there is no weight_scale")
    return shape


def _decode(parts: Parts, args: Args | None, shape: tuple[int, int]) -> Tensor:
    keep_OI = unpack_bits(parts["bitmask"].read(), 1, shape[1]).bool()
    values = parts["compressed"].read()
    num_kept = int(keep_OI.sum())
    if num_kept != values.numel():
        raise InputError(
            f"tensor {parts['bitmask'].name} has {num_kept} bits set for {values.numel()} values"
        )
    if values.ndim == 2:
        uneven = (keep_OI.sum(1) != values.shape[1]).nonzero()
        if len(uneven):
            raise InputError(
                f"tensor {parts['bitmask'].name}, row {int(uneven[0])}: its bits are not half set"
            )
    if values.dtype == torch.float8_e4m3fn:
        values = values.float()  # masked assignment is not there for float8
    dense_OI = torch.zeros(shape, dtype=values.dtype)
    dense_OI[keep_OI] = values.flatten()
    if "weight_scale" not in parts:
        return dense_OI
    zero = parts["weight_zero_point"].read() if "weight_zero_point" in parts else None
    found = need_args(parts, args)
    zero = None if found.symmetric else zero
    return meaning(dense_OI, parts["weight_scale"].read(), zero, found)


READER = Reader(
    ("sparse-24-bitmask", "sparse-bitmask"), "bitmask", ("compressed", "bitmask", "shape"),
    ("row_offsets", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point"),
    _shape, _decode,
)  # fmt: skip
