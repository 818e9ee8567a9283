"""One-shot pruning methods. One file = one method: drop a module that exports METHOD in here."""

from __future__ import annotations

import functools

from sparsify.listing import chosen, listed
from sparsify.methods._base import Method, Problem, PruneParams, Solution

__all__ = ["Method", "Problem", "PruneParams", "Solution", "available_methods", "get_method"]


@functools.cache
def available_methods() -> dict[str, Method]:
    """Every method of this folder by its name."""
    return {method.name: method for method in listed(__name__, "METHOD")}


def get_method(name: str) -> Method:
    """The method called `name`; InputError that lists those that exist if there is none."""
    return chosen(available_methods(), name, "prune.method")
