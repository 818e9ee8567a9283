"""Grids of integers: two's complement, or codes from 0 on beside a zero point for each group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from sparsify.kernels.rounding import Rounding
from sparsify.quantization.schemes._base import Grid, divisors, shares

_MOVES = (0, -1, 1)  # of the zero point that fits a scale


class SymmetricIntegers(Grid):
    """-2^(bits-1) to 2^(bits-1) - 1."""

    def __init__(self, bits: int) -> None:
        self._lowest = -(2 ** (bits - 1))
        self.highest = 2 ** (bits - 1) - 1
        self.rounding = Rounding("integers", self._lowest, self.highest)

    def rounder(self, scales: Tensor, zeros: Tensor | None) -> Callable[[Tensor], Tensor]:
        """See `Grid`; ties to even."""
        divisor = divisors(scales)
        return lambda values: (values / divisor).round_().clamp_(self._lowest, self.highest)

    def stored(self, levels_OI: Tensor, zeros_OI: Tensor | None) -> Tensor:
        """int8."""
        return levels_OI.to(torch.int8)


class AsymmetricIntegers(Grid):
    """Codes 0 to 2^bits - 1 less the group's zero point, which is such a code too."""

    has_both_signs = False

    def __init__(self, bits: int) -> None:
        self._top = 2**bits - 1
        self.highest = 2 ** (bits - 1)
        self.rounding = Rounding("integers", 0, self._top, has_zeros=True)

    def rounder(self, scales: Tensor, zeros: Tensor | None) -> Callable[[Tensor], Tensor]:
        """See `Grid`; ties to even."""
        assert zeros is not None
        divisor, lowest, highest = divisors(scales), -zeros, self._top - zeros
        return lambda values: torch.clamp((values / divisor).round_(), lowest, highest)

    def stored(self, levels_OI: Tensor, zeros_OI: Tensor | None) -> Tensor:
        """uint8; a level of 0 is the zero point."""
        assert zeros_OI is not None
        return (levels_OI + zeros_OI).to(torch.uint8)

    def tries(self, kept_RB: Tensor, num_steps: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Shares of the scale that just spans the weights and 0, with the zero point that fits it
        and its two neighbours."""
        lowest_R = kept_RB.amin(-1).clamp_(max=0.0)
        width_R = (kept_RB.amax(-1).clamp_(min=0.0) - lowest_R) / self._top
        for share in shares(num_steps):
            scales_R = self.rounded(width_R * share)
            middle_R = (-lowest_R * (1 + share) / 2 / divisors(scales_R)).round_()
            for move in _MOVES:
                yield scales_R, (middle_R + move).clamp_(0, self._top)

    def shifted_shares(self, num_steps: int) -> Iterator[tuple[float, int]]:
        """See `Grid`."""
        return product(shares(num_steps), _MOVES)
