"""What a quantisation scheme is: the values that a weight can take, and how its scale is found.

A weight is level * scale; 0 is a level of every grid, so that pruned weights are exact.
Shape suffixes: O output features (rows), I input features (columns), R some of the rows, B columns
of one group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.kernels.rounding import Rounding
from sparsify.packed.layout import Scheme
from sparsify.params import PER_CHANNEL, QuantParams

_MANY_GROUPS = 8

_SMALLEST_SHARE = 0.5  # of the widest scale, that the search still tries


class Grid(ABC):
    """The levels of a scheme. Levels are floating point; scales and zeros belong to groups."""

    scale_dtype = torch.float16
    """what scales are stored in"""
    highest: float
    """level that the largest weight gets at the widest scale"""
    has_both_signs = True
    """whether a negative scale makes other values of the levels"""

    rounding: Rounding | None = None
    """the same levels for kernels; None: GPUs too run PyTorch's operations, one column at a time"""

    @abstractmethod
    def rounder(self, scales: Tensor, zeros: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What gives the level nearest to each value, as a new tensor; 0 where the scale is 0.

        Args:
            scales: of a shape that fits that of the values to come.
            zeros: likewise, of an asymmetric grid; else None.
        """

    def nearest(self, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """The level nearest to each value, of any shape; see `rounder`."""
        return self.rounder(scales, zeros)(values)

    @abstractmethod
    def stored(self, levels_OI: Tensor, zeros_OI: Tensor | None) -> Tensor:
        """Levels as `packed.layer.Codes.values_OI` has them."""

    def tries(self, kept_RB: Tensor, num_steps: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(scales, zeros) that the search compares, each (R,): here the max-abs scale and shares of
        it down to one half, of either sign, for levels may reach further down than up.

        Args:
            kept_RB: weights of one group, 0 where pruned; or of a stack (E, R, B).
            num_steps: number of shares.
        """
        widest_R = kept_RB.abs().amax(-1) / self.highest
        for share, _ in self.shifted_shares(num_steps):
            yield self.rounded(widest_R * share), None

    def shifted_shares(self, num_steps: int) -> Iterator[tuple[float, int]]:
        """Of each try, the share of the widest scale and what is added to its zero point."""
        for share in shares(num_steps):
            yield from [(share, 0), (-share, 0)] if self.has_both_signs else [(share, 0)]

    def rounded(self, scales: Tensor) -> Tensor:
        """Scales as they will be stored, in the dtype given."""
        return scales.to(self.scale_dtype).to(scales.dtype)


def shares(num_steps: int) -> list[float]:
    """Shares of the widest scale, the whole first."""
    found: list[float] = torch.linspace(1.0, _SMALLEST_SHARE, num_steps).tolist()
    return found


def divisors(scales: Tensor) -> Tensor:
    """What to divide by for values in units of the scale, 0 where the scale is 0."""
    return torch.where(scales == 0, math.inf, scales)


@dataclass(frozen=True)
class QuantScheme:
    """A quantisation scheme."""

    name: str
    """of its file, and as `quantize.scheme` has it"""
    summary: str
    type: str
    """of `packed.layout.Scheme`"""
    make_grid: Callable[[bool], Grid]
    """from whether it is symmetric"""
    bits: int | None = None
    """of a code, for types that say so"""
    group_size: int = PER_CHANNEL
    """columns that share a scale unless told otherwise; a quarter of it in rows of fewer than eight
    such groups, in which a scale for so many costs too much (docs/quantization.md)"""
    has_groups: bool = False
    """whether it can be told otherwise"""
    can_be_asymmetric: bool = False
    activations: str | None = None
    """see `packed.layout.Scheme`"""

    def check(self, params: QuantParams) -> None:
        """Require what the scheme has.

        Raises:
            InputError: it has no groups, or is always symmetric.
        """
        if params.group_size not in (None, PER_CHANNEL) and not self.has_groups:
            raise InputError(
                f"quantize.group_size={params.group_size} with quantize.scheme={self.name}: it has "
                "one scale for each output channel; leave group_size out"
            )
        if not params.symmetric and not self.can_be_asymmetric:
            raise InputError(
                f"quantize.symmetric=false with quantize.scheme={self.name}: it has no zero "
                "points; use quantize.symmetric=true, or quantize.scheme=int4"
            )

    def grid(self, params: QuantParams) -> Grid:
        """What weights are rounded to; errors as `check`."""
        self.check(params)
        return self.make_grid(params.symmetric)

    def group_size_of(self, params: QuantParams, num_columns: int) -> int:
        """Columns of a row that share a scale, all of them for one scale a channel."""
        size = params.group_size
        if size is None:
            is_narrow = num_columns < _MANY_GROUPS * self.group_size
            size = self.group_size // 4 if is_narrow else self.group_size
        return num_columns if size == PER_CHANNEL else size

    def stored_as(self, params: QuantParams, num_columns: int) -> Scheme:
        """How the packed format calls it, for a layer of so many columns."""
        size = None if self.bits is None else self.group_size_of(params, num_columns)
        return Scheme(self.type, self.bits, size, params.symmetric, self.activations)
