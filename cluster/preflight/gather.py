"""How the workers of a preflight tell each other what they have found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist


@contextlib.contextmanager
def gathering(timeout_s: float) -> Iterator[Callable[[Any], list[Any]]]:
    """A way to tell a value to all workers: over gloo, whatever state the GPUs are in.

    All of them call it, equally often; each gets all values, by rank.
    """
    if not dist.is_initialized():
        yield lambda value: [value]
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(value: Any) -> list[Any]:
        heard: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(heard, value, group=group)
        return heard

    try:
        yield gather
    finally:
        dist.destroy_process_group(group)
