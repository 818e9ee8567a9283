"""Float8 e4m3 for engines that round activations too, with a scale for every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.kernels.rounding import Rounding
from sparsify.quantization.schemes._base import Grid, QuantScheme, divisors


class Float8Grid(Grid):
    """e4m3: 448 and down, no infinity; beyond it weights get the largest level."""

    scale_dtype = torch.float32
    highest = torch.finfo(torch.float8_e4m3fn).max
    has_both_signs = False
    rounding = Rounding("float8", -highest, highest, is_half=False)

    def rounder(self, scales: Tensor, zeros: Tensor | None) -> Callable[[Tensor], Tensor]:
        """See `Grid`; ties to even. A float64 value goes through float32."""
        divisor = divisors(scales)

        def nearest(values: Tensor) -> Tensor:
            clamped = (values / divisor).clamp_(-self.highest, self.highest).float()
            return clamped.to(torch.float8_e4m3fn).to(values.dtype)

        return nearest

    def stored(self, levels_OI: Tensor, zeros_OI: Tensor | None) -> Tensor:
        """float8_e4m3fn."""
        return levels_OI.float().to(torch.float8_e4m3fn)


def _grid(symmetric: bool) -> Grid:
    return Float8Grid()


SCHEME = QuantScheme(
    "fp8", "float8 e4m3, a scale for each output channel", "fp8", _grid, activations="fp8"
)
