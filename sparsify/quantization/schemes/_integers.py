"""Grids of integers: two's complement, or codes from 0 on beside a zero point for each group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsify.quantization.schemes._base import Grid, quotient, shares


class SymmetricIntegers(Grid):
    """-2^(bits-1) to 2^(bits-1) - 1."""

    def __init__(self, bits: int) -> None:
        self._lowest = -(2 ** (bits - 1))
        self.highest = 2 ** (bits - 1) - 1

    def nearest(self, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """See `Grid`."""
        return quotient(values, scales).round_().clamp_(self._lowest, self.highest)

    def stored(self, levels_OI: Tensor, zeros_OI: Tensor | None) -> Tensor:
        """int8."""
        return levels_OI.to(torch.int8)


class AsymmetricIntegers(Grid):
    """Codes 0 to 2^bits - 1 less the group's zero point, which is such a code too."""

    has_both_signs = False

    def __init__(self, bits: int) -> None:
        self._top = 2**bits - 1
        self.highest = 2 ** (bits - 1)

    def nearest(self, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """See `Grid`."""
        assert zeros is not None
        levels = quotient(values, scales).round_()
        return torch.minimum(torch.maximum(levels, -zeros), self._top - zeros)

    def stored(self, levels_OI: Tensor, zeros_OI: Tensor | None) -> Tensor:
        """uint8; a level of 0 is the zero point."""
        assert zeros_OI is not None
        return (levels_OI + zeros_OI).to(torch.uint8)

    def tries(self, kept_RB: Tensor, num_steps: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Shares of the scale that just spans the weights and 0, with the zero point that fits it
        and its two neighbours."""
        lowest_R = kept_RB.amin(1).clamp_(max=0.0)
        width_R = (kept_RB.amax(1).clamp_(min=0.0) - lowest_R) / self._top
        for share in shares(num_steps):
            scales_R = self.rounded(width_R * share)
            middle_R = quotient(-lowest_R * (1 + share) / 2, scales_R).round_()
            for move in (0, -1, 1):
                yield scales_R, (middle_R + move).clamp_(0, self._top)
