"""Folders in which one file is one entry: listed, so that no registry is kept by hand."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, TypeVar

from sparsify.errors import InputError
from sparsify.params import close_match

Entry = TypeVar("Entry")


def module_names(package: str) -> list[str]:
    """Modules of a package without an underscore in front, by name; imports none of them."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def listed(package: str, attribute: str) -> list[Any]:
    """What each of these modules exports as `attribute`; an import error is not hidden."""
    names = module_names(package)
    return [getattr(importlib.import_module(f"{package}.{name}"), attribute) for name in names]


def chosen(entries: Mapping[str, Entry], name: str, option: str) -> Entry:
    """The entry called `name`.

    Args:
        entries: by name.
        name: what was asked for.
        option: that asked, such as `prune.method`.

    Raises:
        InputError: there is none; the message lists those that exist.
    """
    if name not in entries:
        raise InputError(
            f"{option}={name}: unknown{close_match(name, list(entries))}; use one of "
            f"{', '.join(entries)}"
        )
    return entries[name]
