"""The order of training rows, as arithmetic: a function of (seed, slot), with no list and no state.

A run is a line of slots 0, 1, 2, ...; step t with batches of B rows is slots t B to (t + 1) B - 1,
on any number of workers. All that has to be remembered is how many slots were used. Owns the order
alone: what a row holds is in `sparsify.data.store`.

Everything here is integer arithmetic, so that the order is the same on every machine; a test holds
it to stored values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsify.errors import InputError

Words = NDArray[np.uint64]

Ints = NDArray[np.int64]

BLOCK_SLOTS = 1000
"""slots in which every source of a mix has a fixed number of rows"""

_NUM_ROUNDS = 16  # measured: with 8, places of a set of five were 0.3 % from equally likely

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

_KEPT_BLOCKS = 8


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `shares` (which sum to 1) that sum to `total`.

    Each is its share of the total rounded down or up: less than 1 away from it.
    """
    counts = [math.floor(share * total) for share in shares]
    rests = [count - share * total for count, share in zip(counts, shares, strict=True)]
    for index in sorted(range(len(shares)), key=rests.__getitem__)[: total - sum(counts)]:
        counts[index] += 1
    return counts


def key_of(*parts: object) -> int:
    """64 bits that depend on the parts alone: SHA-256 of their texts."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _mixed(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permuted(index_N: Ints, num_items: int, key_N: Words) -> Ints:
    """Where each index goes in a keyed permutation of range(num_items).

    A Feistel network over a x b >= num_items cells with addition modulo a and b in place of XOR
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", their methods 2 and 3): an
    index that lands outside is sent on until it is inside, which keeps it a bijection. With
    a = ceil(sqrt(num_items)) and b = ceil(num_items / a) fewer than a cells are outside, so that
    few go round twice.

    Args:
        index_N: int64, in range(num_items).
        num_items: size of the permuted set; at least 1.
        key_N: uint64, one key per index (or one for all, of shape (1,)); a permutation per key.

    Returns:
        int64 (N,), in range(num_items).

    Cost: O(N), no memory beyond a few arrays of N.
    """
    a = math.isqrt(num_items - 1) + 1
    b = -(-num_items // a)
    offsets_R = np.arange(1, _NUM_ROUNDS + 1, dtype=np.uint64) * _GOLDEN
    keys_RN = _mixed(key_N + offsets_R[:, None])
    cell_N = _feistel(index_N.astype(np.uint64), a, b, keys_RN)
    while (outside := np.flatnonzero(cell_N >= num_items)).size:
        keys = keys_RN[:, outside] if keys_RN.shape[1] > 1 else keys_RN
        cell_N[outside] = _feistel(cell_N[outside], a, b, keys)
    return cell_N.astype(np.int64)


def _feistel(cell_N: Words, a: int, b: int, keys_RN: Words) -> Words:
    """One walk through the rounds: left half in range(a), right half in range(b)."""
    sizes = np.uint64(a), np.uint64(b)
    halves = list(np.divmod(cell_N, sizes[1]))
    for r, key_N in enumerate(keys_RN):
        changed, other = r % 2, 1 - r % 2
        size = sizes[changed]
        halves[changed] = (halves[changed] + _mixed(halves[other] ^ key_N) % size) % size
    return halves[0] * sizes[1] + halves[1]


@dataclass(frozen=True, eq=False)
class Places:
    """What each of N slots holds."""

    source_N: Tensor
    """int64 number of the source"""
    epoch_N: Tensor
    """int64 times that all rows of the source were used before"""
    row_N: Tensor
    """int64 row of the source"""


class TrainingOrder:
    """Which row of which source each slot of a run holds.

    Every run of BLOCK_SLOTS slots, from the first one on, holds the same number of rows of each
    source: its share of the weights in thousands, less than a thousandth off, the same in every
    block. Inside a block the sources are spread evenly, at places that depend on the seed: of S
    sources, the first p slots of a block hold each one's part of p to within 1 + S rows.

    The rows of a source come in a permutation of their own for every pass over it; none comes
    again before all have come.

    Args:
        num_rows: rows of each source.
        weights: of the sources, in any unit; None only for one source.
        seed: any integer.

    Raises:
        InputError: a source without rows, or with a weight too small for one row in a block.
    """

    def __init__(
        self, num_rows: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        weights = [1.0] if weights is None else weights
        if len(weights) != len(num_rows) or not num_rows:
            raise InputError(
                f"training order: {len(weights)} weights for {len(num_rows)} sources; give one each"
            )
        for index, (count, weight) in enumerate(zip(num_rows, weights, strict=True)):
            if count < 1 or not (math.isfinite(weight) and weight > 0):
                raise InputError(
                    f"training order: source {index} has {count} rows and weight {weight}; it "
                    "needs at least one row and a weight over 0"
                )
        self.num_rows = tuple(num_rows)
        self.seed = seed
        total = math.fsum(weights)
        self.block_counts = tuple(largest_remainder([w / total for w in weights], BLOCK_SLOTS))
        """rows of each source in every block"""
        if 0 in self.block_counts:
            source = self.block_counts.index(0)
            raise InputError(
                f"training order: the weight of source {source} is "
                f"{weights[source] / total:.2g} of all, less than one row in {BLOCK_SLOTS}; raise "
                "it, or leave the source out"
            )
        self._first_rows = np.cumsum([0, *self.num_rows[:-1]])
        self._keys = [key_of("rows", seed, index) for index in range(len(self.num_rows))]
        self._blocks: dict[int, tuple[Ints, Ints]] = {}

    def places(self, slots: Tensor | Sequence[int]) -> Places:
        """Source, pass and row of each slot.

        Args:
            slots: int64 (N,), not negative, in any order.

        Cost: O(N + BLOCK_SLOTS log BLOCK_SLOTS) for slots near each other.
        """
        slot_N = np.asarray(slots, dtype=np.int64).reshape(-1)
        if slot_N.size and slot_N.min() < 0:
            raise InputError(f"training order: slot {slot_N.min()}; slots count from 0")
        source_N, local_N = self._local(slot_N)
        epoch_N, row_N = np.zeros_like(slot_N), np.zeros_like(slot_N)
        for source, num_rows in enumerate(self.num_rows):
            at = np.flatnonzero(source_N == source)
            if at.size:
                epoch_N[at], index_N = np.divmod(local_N[at], num_rows)
                row_N[at] = permuted(index_N, num_rows, self._epoch_keys(source, epoch_N[at]))
        return Places(*map(torch.from_numpy, (source_N, epoch_N, row_N)))

    def rows(self, slots: Tensor | Sequence[int]) -> Tensor:
        """int64 (N,): the row of each slot, counted through all sources in their order."""
        places = self.places(slots)
        return torch.from_numpy(self._first_rows)[places.source_N] + places.row_N

    def batch(self, step: int, batch_size: int) -> Tensor:
        """`rows` of one step, of all workers together."""
        return self.rows(range(step * batch_size, (step + 1) * batch_size))

    def _epoch_keys(self, source: int, epoch_N: Ints) -> Words:
        if (epoch_N == epoch_N[0]).all():
            epoch_N = epoch_N[:1]  # the usual case: the keys of the rounds are made once
        key = np.array([self._keys[source]], dtype=np.uint64)
        return _mixed(key + _mixed(epoch_N.astype(np.uint64) + _GOLDEN))

    def _local(self, slot_N: Ints) -> tuple[Ints, Ints]:
        """(source, how many rows of that source came before) of each slot."""
        if len(self.num_rows) == 1:
            return np.zeros_like(slot_N), slot_N
        block_N, place_N = np.divmod(slot_N, BLOCK_SLOTS)
        source_N, local_N = np.zeros_like(slot_N), np.zeros_like(slot_N)
        counts = np.array(self.block_counts)
        for block in np.unique(block_N).tolist():
            at = np.flatnonzero(block_N == block)
            source_K, rank_K = self._block(block)
            source_N[at] = source_K[place_N[at]]
            local_N[at] = block * counts[source_N[at]] + rank_K[place_N[at]]
        return source_N, local_N

    def _block(self, block: int) -> tuple[Ints, Ints]:
        """(source, rank among the slots of that source) of every slot of a block.

        Row j of a source with n rows in the block is at a random place of the j-th of n equal
        stretches: evenly spread, and not in step with any number of workers.
        """
        if block not in self._blocks:
            key = np.array([key_of("block", self.seed, block)], dtype=np.uint64)
            source_K = np.repeat(np.arange(len(self.num_rows)), self.block_counts)
            rank_K = np.concatenate([np.arange(n) for n in self.block_counts])
            words_K = _mixed(key + np.arange(BLOCK_SLOTS, dtype=np.uint64) * _GOLDEN)
            place_K = (rank_K.astype(np.uint64) << np.uint64(32)) + (words_K >> np.uint64(32))
            # Shares of the block in units of 2^-32: below 2^42 * n before the division.
            place_K = (
                place_K
                * np.uint64(BLOCK_SLOTS)
                // np.repeat(np.array(self.block_counts, dtype=np.uint64), self.block_counts)
            )
            order_K: Any = np.argsort(place_K, kind="stable")
            while len(self._blocks) >= _KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[block] = source_K[order_K], rank_K[order_K]
        return self._blocks[block]
