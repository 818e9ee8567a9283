"""int-quantized, float-quantized, naive-quantized: a code a byte under the weight's own name.

Of each layer: `weight` int8 or float8 e4m3 (O, I); `weight_scale` of the tensor, its rows or groups
of columns; asymmetric ones `weight_zero_point` of that shape. Scales of the activations are not
looked at: what is read are the weights.
"""

from __future__ import annotations

from torch import Tensor

from sparsify.models.foreign._base import (
    Args,
    Parts,
    Reader,
    check_scales,
    columns_of,
    meaning,
    need_args,
)


def _shape(parts: Parts, args: Args | None) -> tuple[int, int]:
    args, weight = need_args(parts, args), parts["weight"]
    expected = "F8_E4M3" if args.type == "float" else "I8"
    if weight.dtype != expected or len(weight.shape) != 2:
        raise weight.wrong(f"a matrix of {expected}, as {args.type} of {args.num_bits} bits")
    num_rows, num_columns = weight.shape
    check_scales(parts, args, (num_rows, num_columns))
    return num_rows, num_columns


def _decode(parts: Parts, args: Args | None, shape: tuple[int, int]) -> Tensor:
    args = need_args(parts, args)
    zero = None
    if "weight_zero_point" in parts and not args.symmetric:
        zero = parts["weight_zero_point"].read()
    group_I = columns_of(parts, args, shape[1])
    return meaning(parts["weight"].read(), parts["weight_scale"].read(), zero, args, group_I)


READER = Reader(
    ("int-quantized", "float-quantized", "naive-quantized"), "weight_scale",
    ("weight", "weight_scale"),
    ("weight_zero_point", "weight_g_idx", "weight_shape", "input_scale", "input_zero_point"),
    _shape, _decode,
)  # fmt: skip
