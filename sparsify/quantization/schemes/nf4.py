"""NormalFloat of four bits: sixteen levels that are close where normal weights are many.

Reference: QLoRA (arXiv:2305.14314), appendix E. Scales of either sign are this project's own: the
levels are not symmetric.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.kernels.rounding import Rounding
from sparsify.packed.layer import NF4
from sparsify.quantization.schemes._base import Grid, QuantScheme, divisors


class NormalFloats(Grid):
    """The published levels, of which the eighth is 0."""

    highest = 1.0

    def __init__(self) -> None:
        self._levels = torch.tensor(NF4, dtype=torch.float32)
        self._bounds = (self._levels[1:].double() + self._levels[:-1].double()) / 2
        self.rounding = Rounding("table", -1.0, 1.0, table=(*NF4, *self._bounds.tolist()))

    def rounder(self, scales: Tensor, zeros: Tensor | None) -> Callable[[Tensor], Tensor]:
        """See `Grid`; ties to the lower level."""
        divisor = divisors(scales)
        levels, bounds = (t.to(divisor.device, divisor.dtype) for t in (self._levels, self._bounds))
        return lambda values: levels[torch.bucketize((values / divisor).contiguous(), bounds)]

    def stored(self, levels_OI: Tensor, zeros_OI: Tensor | None) -> Tensor:
        """uint8 places in the table."""
        bounds = self._bounds.to(levels_OI.device, levels_OI.dtype)
        return torch.bucketize(levels_OI.contiguous(), bounds).to(torch.uint8)


def _grid(symmetric: bool) -> Grid:
    return NormalFloats()


SCHEME = QuantScheme(
    "nf4", "sixteen levels for normal weights, a scale for each group of columns", "nf4", _grid,
    bits=4, group_size=64, has_groups=True,
)  # fmt: skip
