"""What one weight is rounded to, and what that is to be near to.

Shape suffixes: O output features (rows), I input features (columns), G groups of columns. Of a
stack of weights all tensors have a leading dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from sparsify.params import QuantParams
from sparsify.quantization.schemes import Grid


class Levels(NamedTuple):
    """What a weight was rounded to: level * scale, in the dtype of the computation."""

    levels_OI: Tensor
    """0 wherever the keep mask is False"""
    scales_OG: Tensor
    zeros_OG: Tensor | None
    """of an asymmetric grid"""

    @classmethod
    def of(
        cls, levels_OI: Tensor, scales: Sequence[Tensor], zeros: Sequence[Tensor | None]
    ) -> Self:
        """From the (O,) scales and zeros of every group."""
        found = [zeros_O for zeros_O in zeros if zeros_O is not None]
        return cls(
            levels_OI, torch.stack(list(scales), -1), torch.stack(found, -1) if found else None
        )

    def zeros_of(self, group: int) -> Tensor | None:
        """Zeros (O,) of a group."""
        return None if self.zeros_OG is None else self.zeros_OG[..., group]


@dataclass(frozen=True)
class Problem:
    """A weight to round such that tr((T - Q) H (T - Q)^T) is small, its columns in some order."""

    target_OI: Tensor
    """T"""
    keep_OI: Tensor
    """bool, True = survives"""
    damped_II: Tensor
    """H"""
    grid: Grid
    group_size: int
    params: QuantParams
