"""What a reader is, and what it is given to read.

Shape suffixes: O output features, I input features, G groups of columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sparsify.errors import InputError


@dataclass(frozen=True)
class Part:
    """A stored tensor."""

    path: Path
    name: str
    dtype: str
    """as safetensors names it"""
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """It, on the CPU."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)

    def wrong(self, expected: str) -> InputError:
        """The error of a tensor that is not what it has to be."""
        return InputError(f"tensor {self.name} is {self.shape} of {self.dtype}, not {expected}")


Parts = Mapping[str, Part]
"""last part of the name -> tensor, of one layer"""


@dataclass(frozen=True)
class Args:
    """How a layer's weights are quantised: `weights` of a group of the configuration."""

    num_bits: int
    type: str
    """int or float"""
    symmetric: bool
    strategy: str
    """tensor, channel or group"""
    group_size: int | None

    def num_groups(self, num_columns: int) -> int:
        """G: scales of a row."""
        return 1 if self.group_size is None else -(-num_columns // self.group_size)


@dataclass(frozen=True)
class Reader:
    """A way in which a layer is stored."""

    formats: tuple[str, ...]
    """as config.json calls it"""
    key: str
    """last part of a name that only layers stored so have"""
    required: tuple[str, ...]
    """parts that such a layer must have"""
    optional: tuple[str, ...]
    """parts that it may have besides"""
    shape: Callable[[Parts, Args | None], tuple[int, int]]
    """(O, I) of the dense weight, after checking every part's dtype and shape; InputError names
    the tensor"""
    decode: Callable[[Parts, Args | None, tuple[int, int]], Tensor]
    """The dense weight: as it is stored, or float32 of codes and scales."""


def require(part: Part, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """InputError unless a tensor is of one of these dtypes, and of this shape."""
    if part.dtype not in dtypes or part.shape != shape:
        raise part.wrong(f"{shape} of {' or '.join(dtypes)}")


def need_args(parts: Parts, args: Args | None) -> Args:
    """InputError where the configuration does not say how a layer is quantised."""
    if args is None:
        part = next(iter(parts.values()))
        raise InputError(f"tensor {part.name}: no group of config_groups is of this layer")
    return args


def stored_shape(part: Part) -> tuple[int, int]:
    """(O, I) from a tensor that holds it."""
    if part.dtype not in ("I64", "I32") or sorted(part.shape, reverse=True)[:1] != [2]:
        raise part.wrong("the two numbers of a shape")
    num_rows, num_columns = part.read().flatten().tolist()
    if num_rows < 1 or num_columns < 1:
        raise InputError(f"tensor {part.name} says the shape {num_rows} x {num_columns}")
    return num_rows, num_columns


SCALES = ("BF16", "F16", "F32")


def check_scales(parts: Parts, args: Args, shape: tuple[int, int], zeros: bool = True) -> None:
    """Require scales, and zero points where there are some, of the strategy's shape.

    Args:
        parts: of the layer.
        args: with the strategy.
        shape: (O, I) of the weight.
        zeros: whether zero points have the shape of the scales.
    """
    num_rows, num_columns = shape
    known = {
        "tensor": ((), (1,), (1, 1)),
        "channel": ((num_rows, 1), (num_rows,)),
        "group": ((num_rows, args.num_groups(num_columns)),),
    }[args.strategy]
    for name in ("weight_scale", "weight_zero_point") if zeros else ("weight_scale",):
        part = parts.get(name)
        dtypes = SCALES if name == "weight_scale" else ("I8", *SCALES, "F8_E4M3")
        if part is not None and (part.dtype not in dtypes or part.shape not in known):
            raise part.wrong(f"{known[0]} of {' or '.join(dtypes)}, as strategy {args.strategy}")
    if "weight_g_idx" in parts:
        require(parts["weight_g_idx"], ("I32", "I64"), (num_columns,))


def meaning(
    codes_OI: Tensor, scale: Tensor, zero: Tensor | None, args: Args, group_I: Tensor | None = None
) -> Tensor:
    """float32 (O, I): (code - zero) * scale.

    Args:
        codes_OI: any dtype.
        scale: of the tensor, (O) or (O, 1) of rows, or (O, G) of groups.
        zero: of the same shape, or None.
        args: with the strategy.
        group_I: the group of each column; None where they lie one after another.
    """

    def spread(values: Tensor) -> Tensor:
        values = values.float()
        if args.strategy == "tensor":
            return values.reshape(1, 1)
        if args.strategy == "channel":
            return values.reshape(-1, 1)
        if group_I is not None:
            return values[:, group_I.long()]
        assert args.group_size is not None, "checked when it was opened"
        return values.repeat_interleave(args.group_size, dim=1)[:, : codes_OI.shape[1]]

    weight_OI = codes_OI.float()
    if zero is not None:
        weight_OI = weight_OI - spread(zero)
    # -0.0 + 0.0 = +0.0: code 0 under a negative scale must not leave a sign bit behind.
    return weight_OI * spread(scale) + 0.0


def columns_of(parts: Parts, args: Args, num_columns: int) -> Tensor | None:
    """The group of each column where the columns were reordered, else None."""
    if "weight_g_idx" not in parts:
        return None
    group_I = parts["weight_g_idx"].read()
    if bool((group_I == -1).all()):
        return None  # what is written where nothing was reordered
    if not 0 <= int(group_I.min()) <= int(group_I.max()) < args.num_groups(num_columns):
        raise InputError(f"tensor {parts['weight_g_idx'].name} names groups that are not there")
    return group_I


def unpack_words(words: Tensor, bits: int, num_values: int) -> Tensor:
    """Unsigned numbers of 4 or 8 bits from int32 words, the first in the lowest bits.

    Args:
        words: int32 (R, W).
        bits: of each.
        num_values: of a row.

    Returns:
        uint8 (R, num_values).
    """
    as_bytes = words.contiguous().view(torch.uint8)  # little-endian, as safetensors is
    if bits == 4:
        as_bytes = torch.stack((as_bytes & 15, as_bytes >> 4), dim=-1).flatten(1)
    return as_bytes[:, :num_values]
