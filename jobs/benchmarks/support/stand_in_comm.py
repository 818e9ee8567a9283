"""The first of several GPUs that are not there: what crosses their links is counted, not sent.

The first has the largest pieces of what is shared out, so that the others wait for it and not it
for them. What the others would answer is what sound data gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jobs.benchmarks.support.stand_in_gpu import StandInGpu
from sparsify.comm import Comm

_FACTOR_FACTS = (0.01, 1, 1.0)
"""what the owner of a factor tells the others: damping, attempts and condition"""


@dataclass(frozen=True)
class StandInComm(Comm):
    """Rank 0 of `world_size` GPUs of one machine.

    Sums travel around a ring (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002): each GPU
    sends 2 (N - 1) / N of them.
    """

    gpu: StandInGpu = field(kw_only=True)

    def all_reduce_(self, tensor: Tensor) -> None:
        """Count the ring; the tensor stays as it is."""
        share = 2 * (self.world_size - 1) / self.world_size
        self.gpu.exchange("all_reduce", share * _num_bytes(tensor))()

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Count the tensor once."""
        self.gpu.exchange("broadcast", _num_bytes(tensor))()

    def gather_objects(self, value: Any) -> list[Any]:
        """The own value for all, but of factors that another has made; the host waits."""
        self.gpu.exchange("gather_objects", 0.0)()
        self.gpu.wait()
        match value:
            case (None, [None, *_] as facts):  # no failure, and a place for each of a stack
                others: Any = (None, [_FACTOR_FACTS] * len(facts))
            case _:
                others = value
        return [value, *[others] * (self.world_size - 1)]

    def barrier(self) -> None:
        """The host waits."""
        self.gpu.wait()

    def gather_rows(self, local_rows: Tensor, num_rows: int) -> Callable[[], Tensor]:
        """Count what the others send, which goes on beside the work until it is asked for."""
        whole = local_rows.new_empty((num_rows, *local_rows.shape[1:]))
        finish = self.gpu.exchange("all_gather", _num_bytes(whole) - _num_bytes(local_rows))

        def wait() -> Tensor:
            finish()
            # As of the pieces: one copy.
            return torch.cat([whole[: len(local_rows)], whole[len(local_rows) :]])

        return wait


def _num_bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())
