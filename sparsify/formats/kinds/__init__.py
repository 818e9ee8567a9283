"""Formats that a model is exported in. One file = one format: drop a module with FORMAT in here.

The folder is listed, not a registry kept by hand; `-` in a format's name is `_` in its file's.
"""

from __future__ import annotations

import importlib

from sparsify.formats.kinds._base import Export, Format, Written

__all__ = ["Export", "Format", "Written", "get_format"]


def get_format(name: str) -> Format:
    """The format called `name`, one of `params.EXPORT_FORMATS`."""
    found: Format = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").FORMAT
    return found
