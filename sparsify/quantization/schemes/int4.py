"""Four-bit integers: 3 bits for a 2:4 weight and its position, plus scales."""

from __future__ import annotations

from sparsify.quantization.schemes._base import Grid, QuantScheme
from sparsify.quantization.schemes._integers import AsymmetricIntegers, SymmetricIntegers


def _grid(symmetric: bool) -> Grid:
    return SymmetricIntegers(4) if symmetric else AsymmetricIntegers(4)


SCHEME = QuantScheme(
    "int4", "4-bit integers, a scale for each group of columns", "int", _grid, bits=4,
    group_size=128, has_groups=True, can_be_asymmetric=True,
)  # fmt: skip
