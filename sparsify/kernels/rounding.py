"""What GPTQ's kernels are told: how values are rounded, and which columns of a weight are next.

Shape suffixes: O output features (rows), B columns of one segment. Of a stack of weights all
tensors have a leading dimension.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor


class Rounding(NamedTuple):
    """The levels of a grid, in words that a kernel has.

    Integers reach from `lowest` to `highest`, less the row's zero point where there is one; float8
    is e4m3 clamped to them; a table has its levels in `table`, ascending, with the bounds between
    them behind.
    """

    kind: Literal["integers", "float8", "table"]
    lowest: float
    highest: float
    has_zeros: bool = False
    is_half: bool = True
    """whether scales are stored as float16, else as float32"""
    table: tuple[float, ...] = ()


class Segment(NamedTuple):
    """Some columns of one group, which have one scale a row; the same columns of each of a stack.

    The (O, B) tensors are views of the same strides, in any layout.
    """

    values_OB: Tensor
    """the weights as they are now, or the descent's residual; scratch"""
    levels_OB: Tensor
    """written"""
    keep_OB: Tensor
    """bool, True = survives"""
    matrix_BB: Tensor
    """the part of U or of H, its rows contiguous"""
    scales_O: Tensor
    zeros_O: Tensor | None
    """of the same stride as the scales"""
