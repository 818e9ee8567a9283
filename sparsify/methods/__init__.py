"""One-shot pruning methods. One file = one method: drop a module that exports METHOD in here.

The folder is listed, not a registry kept by hand; an import error of a method is not hidden.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from sparsify.errors import InputError
from sparsify.methods._base import Method, Problem, PruneParams, Solution
from sparsify.params import close_match

__all__ = ["Method", "Problem", "PruneParams", "Solution", "available_methods", "get_method"]


@functools.cache
def _discovered() -> tuple[Method, ...]:
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}")
               for name in names if not name.startswith("_")]  # fmt: skip
    return tuple(module.METHOD for module in modules)


def available_methods() -> dict[str, Method]:
    """Every method of this folder by its name."""
    return {method.name: method for method in _discovered()}


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        InputError: there is none; the message lists those that exist.
    """
    methods = available_methods()
    if name not in methods:
        hint = close_match(name, list(methods))
        raise InputError(f"method {name!r} does not exist{hint}; choose from {', '.join(methods)}")
    return methods[name]
