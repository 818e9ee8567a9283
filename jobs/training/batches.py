"""The rows of each step for one worker, straight from the token store, and what they amount to."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch

from conf.options.distill import DistillConfig
from sparsify.costs.flops import ModelFlops, distillation_flops, document_lengths
from sparsify.data.rows import TokenRows
from sparsify.data.store import TokenStore
from sparsify.data.teacher_samples import Sample, TeacherSamples
from sparsify.distillation import TokenCounts
from sparsify.distillation.sampling import rows_of


@dataclass(frozen=True, eq=False)
class Batch:
    """One worker's part of a step."""

    step: int
    rows: TokenRows
    """on the CPU"""
    row_crc: int
    """CRC-32 of the numbers of all rows of the step, in their order: the same on every worker"""
    own: torch.Tensor
    """float64 (3,): this worker's tokens of the KL terms and of cross-entropy, and its FLOPs"""
    sample: Sample | None
    """of the teacher at the rows' tokens, row after row, on the CPU; None without a cache"""


class Batches:
    """What each step holds: a function of (seed, step) alone, on any number of workers.

    Args:
        store: the training rows.
        settings: the batch's size.
        seed: of the order.
        rank: this worker.
        world_size: number of workers.
        isolate: whether documents of one row are kept apart; False makes each row one document.
        flops: of student and teacher, None where they cannot be counted; no teacher's where none
            computes.
        cache: the teacher's samples at the store's rows, in place of the teacher; None for none.
    """

    def __init__(
        self, store: TokenStore, settings: DistillConfig, seed: int, rank: int, world_size: int,
        isolate: bool, flops: tuple[ModelFlops, ModelFlops | None] | None,
        cache: TeacherSamples | None = None,
    ) -> None:  # fmt: skip
        self._store, self._order = store, store.order(seed)
        self._size, self._micro = settings.batch_size, settings.micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._isolate, self._flops, self._cache = isolate, flops, cache

    @property
    def has_cache(self) -> bool:
        """Whether batches bring samples of a teacher."""
        return self._cache is not None

    def at(self, step: int) -> Batch:
        """This worker's part of a step."""
        every = self._order.batch(step, self._size)
        numbers = every[self._rank :: self._world_size]
        rows = self._store.rows(numbers)
        if not self._isolate:
            rows = replace(TokenRows.whole(rows.ids_NT), is_answer_NT=rows.is_answer_NT)
        counts = TokenCounts.of(rows)
        flops = 0.0
        if self._flops is not None:
            flops = distillation_flops(*self._flops, document_lengths(rows))
        own = torch.tensor([counts.kl, counts.ce, flops], dtype=torch.float64)
        sample = None if self._cache is None else self._cache.rows(numbers)
        return Batch(step, rows, zlib.crc32(every.numpy().tobytes()), own, sample)

    def micro_batches(self, batch: Batch, device: str) -> list[TokenRows]:
        """The rows in pieces for one forward each, on the device."""
        return batch.rows.to(device).split(self._micro)

    def samples(self, batch: Batch, device: str) -> list[Sample | None]:
        """The teacher's samples for each of `micro_batches`, on the device; None: no cache."""
        starts = range(0, len(batch.rows), self._micro)
        if batch.sample is None:
            return [None for _ in starts]
        size = self._store.sequence_length
        parts = (slice(row * size, (row + self._micro) * size) for row in starts)
        return [rows_of(batch.sample, part).to(device) for part in parts]

    def shares(self, sums: torch.Tensor) -> TokenCounts:
        """What every micro-batch divides its sums by, from `own` summed over the workers."""
        counts = TokenCounts(float(sums[0]), float(sums[1]))
        return counts.shared_by(self._size // self._micro)
