"""Ways to start work elsewhere, one file each: submitted, followed, cancelled, attached to."""

from __future__ import annotations

import importlib

from cluster.kinds._base import Job, Kind
from cluster.kinds._chain import Chain
from cluster.spec import KINDS


def get_kind(name: str) -> Kind:
    """The kind of `cluster/kinds/<name>.py`."""
    if name not in KINDS:
        raise ValueError(f"{name}: no such kind of cluster; there are {', '.join(KINDS)}")
    kind: Kind = importlib.import_module(f"cluster.kinds.{name}").KIND
    return kind


def kind_of(job: Job) -> Kind:
    """What a job's kind can do with it, in one piece or in parts."""
    kind = get_kind(job.kind)
    return Chain(kind) if job.parts else kind
