"""Ways to start work elsewhere, one file each: submitted, followed, cancelled, attached to."""

from __future__ import annotations

import importlib

from cluster.kinds._base import Kind
from cluster.spec import KINDS


def get_kind(name: str) -> Kind:
    """The kind of `cluster/kinds/<name>.py`."""
    if name not in KINDS:
        raise ValueError(f"{name}: no such kind of cluster; there are {', '.join(KINDS)}")
    kind: Kind = importlib.import_module(f"cluster.kinds.{name}").KIND
    return kind
