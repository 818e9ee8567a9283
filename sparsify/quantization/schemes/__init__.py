"""What weights are rounded to, one file each: drop a module that exports SCHEME in here."""

from __future__ import annotations

import functools

from sparsify.listing import chosen, listed
from sparsify.quantization.schemes._base import Grid, QuantScheme

__all__ = ["Grid", "QuantScheme", "available_schemes", "get_scheme"]


@functools.cache
def available_schemes() -> dict[str, QuantScheme]:
    """Every scheme of this folder by its name."""
    return {scheme.name: scheme for scheme in listed(__name__, "SCHEME")}


def get_scheme(name: str) -> QuantScheme:
    """The scheme called `name`; InputError that lists those that exist if there is none."""
    return chosen(available_schemes(), name, "quantize.scheme")
