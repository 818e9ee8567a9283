"""The few collective operations that calibration and pruning need, with a one-process twin.

Wraps the default group of torch.distributed (gloo or nccl), which the caller has started. Knows
nothing of who started the processes or where they run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.errors import InputError


@dataclass(frozen=True)
class Comm:
    """This process's place among `world_size` equal ones, and how they exchange tensors."""

    rank: int
    world_size: int

    @classmethod
    def single(cls) -> Comm:
        """One process: every operation is the identity."""
        return cls(0, 1)

    @classmethod
    def distributed(cls) -> Comm:
        """The default group of torch.distributed.

        Raises:
            InputError: torch.distributed has not been initialised in this process.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "torch.distributed is not initialised in this process; call init_process_group "
                "first, or use Comm.single()"
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace `tensor` (float32 or float64) in place by its sum over all processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def row_slice(self, num_rows: int) -> slice:
        """This process's share of `num_rows` rows: contiguous, sizes differ by at most one."""
        return self._slice_of(self.rank, num_rows)

    def gather_rows(self, local_rows: Tensor, num_rows: int) -> Tensor:
        """Put the shares of all processes together again, on all of them.

        Args:
            local_rows: rows `row_slice(num_rows)` of the whole; any dtype.
            num_rows: rows of the whole.

        Returns:
            Tensor of `num_rows` rows, bit for bit what the processes held.
        """
        if self.world_size == 1:
            return local_rows
        sizes = [len(range(*self._slice_of(rank, num_rows).indices(num_rows)))
                 for rank in range(self.world_size)]  # fmt: skip
        padded = local_rows.new_zeros((max(sizes), *local_rows.shape[1:]))
        padded[: len(local_rows)] = local_rows
        # Raw bytes travel, so that bool and bfloat16 need nothing of the backend.
        as_bytes = padded.reshape(-1).view(torch.uint8)
        received = [torch.empty_like(as_bytes) for _ in sizes]
        dist.all_gather(received, as_bytes)
        parts = [part.view(padded.dtype).reshape(padded.shape)[:size]
                 for part, size in zip(received, sizes, strict=True)]  # fmt: skip
        return torch.cat(parts)

    def _slice_of(self, rank: int, num_rows: int) -> slice:
        return slice(rank * num_rows // self.world_size, (rank + 1) * num_rows // self.world_size)
