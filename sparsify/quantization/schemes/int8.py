"""Eight-bit integers beside activations as they are (W8A16)."""

from __future__ import annotations

from sparsify.quantization.schemes._base import Grid, QuantScheme
from sparsify.quantization.schemes._integers import AsymmetricIntegers, SymmetricIntegers


def _grid(symmetric: bool) -> Grid:
    return SymmetricIntegers(8) if symmetric else AsymmetricIntegers(8)


SCHEME = QuantScheme(
    "int8", "8-bit integers, a scale for each output channel (W8A16)", "int", _grid, bits=8,
    has_groups=True, can_be_asymmetric=True,
)  # fmt: skip
