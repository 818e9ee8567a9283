"""The few collective operations that calibration and pruning need, with a one-process twin.

Wraps the default group of torch.distributed (gloo or nccl), which the caller has started. Knows
nothing of who started the processes or where they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.errors import InputError

T = TypeVar("T")


_LEAST_SHARED = 8192
"""columns from which on a Hessian may be factored by all processes together. A panel of 512 columns
is factored while all wait and then sent, some 0.5 ms on a GPU whatever the width; one process alone
takes 1.7 ms for its part of 8,192 columns, but 0.4 ms of 4,096 (arithmetic, at 13.5 TFLOP/s)."""


@dataclass(frozen=True)
class Comm:
    """This process's place among `world_size` equal ones, and how they exchange tensors."""

    rank: int
    world_size: int
    is_fixed: bool = False
    """True: parts are cut and sums are added in one order for every number of processes, so that
    results do not depend on it by a single bit; False: in the order that is fastest"""

    NUM_LANES = 8
    """pieces that work is cut into when the order is fixed"""

    @property
    def num_lanes(self) -> int:
        """Parts that work is cut into over all processes; see `lanes`."""
        return self.NUM_LANES if self.is_fixed else self.world_size

    def __post_init__(self) -> None:
        if self.is_fixed and self.NUM_LANES % self.world_size:
            raise InputError(
                f"a fixed order of reduction works with 1, 2, 4 or 8 workers, not "
                f"{self.world_size}; use another number, or the fast order"
            )

    @classmethod
    def single(cls, is_fixed: bool = False) -> Comm:
        """One process: every operation is the identity."""
        return cls(0, 1, is_fixed)

    @classmethod
    def distributed(cls, is_fixed: bool = False) -> Comm:
        """The default group of torch.distributed.

        Raises:
            InputError: torch.distributed has not been initialised in this process, or has a number
                of processes that a fixed order cannot be shared by.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "torch.distributed is not initialised in this process; call init_process_group "
                "first, or use Comm.single()"
            )
        return cls(dist.get_rank(), dist.get_world_size(), is_fixed)

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace `tensor` (float32 or float64) in place by its sum over all processes."""
        if self.world_size == 1:
            return
        if not self.is_fixed:
            dist.all_reduce(tensor)
            return
        # A binary tree over the processes continues the tree over each one's lanes.
        step = 1
        while step < self.world_size:
            if self.rank % (2 * step) == step:
                dist.send(tensor, self.rank - step)
            elif self.rank % (2 * step) == 0:
                other = torch.empty_like(tensor)
                dist.recv(other, self.rank + step)
                tensor += other
            step *= 2
        dist.broadcast(tensor, src=0)

    def lanes(self, num_items: int) -> list[slice]:
        """This process's parts of `num_items` items, each to be worked on by itself.

        They are contiguous, and sizes differ by at most one. There is one, or with a fixed order
        NUM_LANES over all processes, whatever their number.
        """
        per_process = self.num_lanes // self.world_size
        mine = range(self.rank * per_process, (self.rank + 1) * per_process)
        return [_slice_of(lane, self.num_lanes, num_items) for lane in mine]

    def row_slice(self, num_rows: int) -> slice:
        """This process's part of `num_rows` rows: contiguous, sizes differ by at most one."""
        return _slice_of(self.rank, self.world_size, num_rows)

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Replace `tensor` in place by that of the process `source`."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=source)

    def gather_objects(self, value: Any) -> list[Any]:
        """Small plain values of all processes, by rank, on all of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def run_together(self, work: Callable[[], T]) -> T:
        """Have every process do its part, which exchanges nothing, and return what its own gave.

        Raises:
            What the part of the lowest rank that failed raised, on all processes, so that none
            waits for ever for one that is gone.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        failures = self.gather_objects(failure)
        failures[self.rank] = failure  # where it happened, with its traceback
        for found in failures:
            if found is not None:
                raise found
        return cast(T, result)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def gather_rows(self, local_rows: Tensor, num_rows: int) -> Callable[[], Tensor]:
        """Start to put the parts of all processes together again, on all of them.

        Args:
            local_rows: rows `row_slice(num_rows)` of the whole; any dtype.
            num_rows: rows of the whole.

        Returns:
            What waits for it and returns the tensor of `num_rows` rows, bit for bit what the
            processes held. Work that does not need them can be done before.
        """
        if self.world_size == 1:
            return lambda: local_rows
        sizes = [
            len(range(*_slice_of(rank, self.world_size, num_rows).indices(num_rows)))
            for rank in range(self.world_size)
        ]
        padded = local_rows.new_zeros((max(sizes), *local_rows.shape[1:]))
        padded[: len(local_rows)] = local_rows
        # Raw bytes travel, so that bool and bfloat16 need nothing of the backend.
        as_bytes = padded.reshape(-1).view(torch.uint8)
        received = [torch.empty_like(as_bytes) for _ in sizes]
        started = dist.all_gather(received, as_bytes, async_op=True)

        def wait() -> Tensor:
            started.wait()
            return torch.cat(
                [part.view(padded.dtype).reshape(padded.shape)[:size]
                 for part, size in zip(received, sizes, strict=True)]
            )  # fmt: skip

        return wait


def sum_lanes(lanes: Iterable[T], merge: Callable[[T, T], Any]) -> T:
    """Add up a process's lanes as the leaves of a binary tree; `Comm.all_reduce_` continues it.

    Args:
        lanes: sums of one lane each, at least one; asked for one by one.
        merge: adds its second argument to its first, in place.

    Memory: 1 + log2(number of lanes) sums at a time.
    """
    tree: list[tuple[int, T]] = []
    for lane in lanes:
        tree.append((0, lane))
        while len(tree) > 1 and tree[-1][0] == tree[-2][0]:
            (level, right), (_, left) = tree.pop(), tree.pop()
            merge(left, right)
            tree.append((level + 1, left))
    return tree[0][1]


def assign_by_size(sizes: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of `sizes` in `num_parts` parts: the largest goes first, to the smallest part."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    filled = [0] * num_parts
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = filled.index(min(filled))
        parts[least].append(index)
        filled[least] += sizes[index]
    return parts


def shared_by_all(sizes: Mapping[str, int], num_shares: int) -> set[str]:
    """Which of the Hessians of so many columns all processes factor together: wide ones that are
    more work than one share of the whole, so that others would wait for them.

    Args:
        sizes: layer -> columns.
        num_shares: that the work of all of them is to be cut into.
    """
    one_share = sum(size**3 for size in sizes.values()) / num_shares
    return {n for n, size in sizes.items() if size >= _LEAST_SHARED and size**3 > one_share}


def _slice_of(index: int, num_parts: int, num_items: int) -> slice:
    return slice(index * num_items // num_parts, (index + 1) * num_items // num_parts)
