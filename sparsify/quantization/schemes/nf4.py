"""NormalFloat of four bits: sixteen levels that are close where normal weights are many.

Reference: QLoRA (arXiv:2305.14314), appendix E. Scales of either sign are this project's own: the
levels are not symmetric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.packed.layer import NF4
from sparsify.quantization.schemes._base import Grid, QuantScheme, quotient


class NormalFloats(Grid):
    """The published levels, of which the eighth is 0."""

    highest = 1.0

    def __init__(self) -> None:
        self._levels = torch.tensor(NF4, dtype=torch.float32)
        self._bounds = (self._levels[1:].double() + self._levels[:-1].double()) / 2

    def _places(self, ratios: Tensor) -> Tensor:
        bounds = self._bounds.to(ratios.device, ratios.dtype)
        return torch.bucketize(ratios.contiguous(), bounds)

    def nearest(self, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """See `Grid`."""
        levels = self._levels.to(values.device, values.dtype)
        return levels[self._places(quotient(values, scales))]

    def stored(self, levels_OI: Tensor, zeros_OI: Tensor | None) -> Tensor:
        """uint8 places in the table."""
        return self._places(levels_OI).to(torch.uint8)


def _grid(symmetric: bool) -> Grid:
    return NormalFloats()


SCHEME = QuantScheme(
    "nf4", "sixteen levels for normal weights, a scale for each group of columns", "nf4", _grid,
    bits=4, group_size=64, has_groups=True,
)  # fmt: skip
