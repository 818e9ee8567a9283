"""What weights are rounded to, one file each: drop a module that exports SCHEME in here.

The folder is listed, not a registry kept by hand; an import error of a scheme is not hidden.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from sparsify.errors import InputError
from sparsify.params import close_match
from sparsify.quantization.schemes._base import Grid, QuantScheme

__all__ = ["Grid", "QuantScheme", "available_schemes", "get_scheme"]


@functools.cache
def available_schemes() -> dict[str, QuantScheme]:
    """Every scheme of this folder by its name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}")
               for name in names if not name.startswith("_")]  # fmt: skip
    return {module.SCHEME.name: module.SCHEME for module in modules}


def get_scheme(name: str) -> QuantScheme:
    """The scheme called `name`.

    Raises:
        InputError: there is none; the message lists those that exist.
    """
    schemes = available_schemes()
    if name not in schemes:
        hint = close_match(name, list(schemes))
        raise InputError(f"quantize.scheme={name}: unknown{hint}; use one of {', '.join(schemes)}")
    return schemes[name]
