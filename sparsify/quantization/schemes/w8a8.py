"""Eight-bit integers for engines that round activations too, with a scale for every token."""

from __future__ import annotations

from sparsify.quantization.schemes._base import Grid, QuantScheme
from sparsify.quantization.schemes._integers import SymmetricIntegers


def _grid(symmetric: bool) -> Grid:
    return SymmetricIntegers(8)


SCHEME = QuantScheme(
    "w8a8", "8-bit integers for weights and, as engines run it, activations", "int", _grid, bits=8,
    activations="int8",
)  # fmt: skip
