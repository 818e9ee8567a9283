"""Which documents are copies of earlier ones, exactly or nearly; the first of each stays.

Near copies are the connected parts of the graph whose edges are the pairs that share a band and are
as similar as the threshold asks: a property of the documents alone, whatever the order in which
pairs are looked at. Memory: some 40 bytes a document; keys and sets are read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from jobs.curation.text import Hashes

Ints = NDArray[np.int64]


class Clusters:
    """Union-find over numbered documents; the least number of a cluster stands for it."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count, dtype=np.int64)

    def find(self, item: int) -> int:
        """The least number of its cluster; paths are halved on the way."""
        parent = self._parent
        while (above := int(parent[item])) != item:
            parent[item] = parent[above]
            item = above
        return item

    def join(self, first: int, second: int) -> bool:
        """Make one cluster of two; False where they are one."""
        first, second = self.find(first), self.find(second)
        if first == second:
            return False
        self._parent[max(first, second)] = min(first, second)
        return True

    def firsts(self) -> Ints:
        """For each document the least number of its cluster."""
        return np.array([self.find(item) for item in range(len(self._parent))], np.int64)


def exact_firsts(digests_N2: Hashes) -> Ints:
    """int64 (N,): for each document the first one of the same 128 bits."""
    order = np.lexsort((np.arange(len(digests_N2)), digests_N2[:, 1], digests_N2[:, 0]))
    ordered = digests_N2[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    firsts = np.empty(len(order), np.int64)
    firsts[order] = order[np.flatnonzero(is_new)[np.cumsum(is_new) - 1]]
    return firsts


def near_firsts(
    keys: Hashes, alive: Ints, similarity: Callable[[int, int], float], threshold: float
) -> Ints:
    """Join the documents that are alike.

    Args:
        keys: uint64 (B, N), of each band.
        alive: numbers of the documents to look at, ascending.
        similarity: of two documents.
        threshold: from which they are copies.

    Returns:
        int64 (N,), for each document the first of its cluster: itself where it is no copy.

    Cost: sorts N keys for each band, and compares every pair of a band once, but for pairs that are
    in one cluster already.
    """
    clusters = Clusters(keys.shape[1])
    for band, column in enumerate(keys):
        for members in _groups(column, alive):
            for first, second in _pairs(members):
                if clusters.find(first) == clusters.find(second):
                    continue
                if (keys[:band, first] == keys[:band, second]).any():
                    continue  # compared there, and not alike
                if similarity(first, second) >= threshold:
                    clusters.join(first, second)
    return clusters.firsts()


def _groups(column: Hashes, alive: Ints) -> Iterator[list[int]]:
    """Numbers of the documents that have a key in common, ascending."""
    values = column[alive]
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    edges = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] + np.uint64(1)))
    sizes = np.diff(edges, append=len(order))
    for begin, size in zip(edges[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        yield alive[order[begin : begin + size]].tolist()


def _pairs(members: list[int]) -> Iterator[tuple[int, int]]:
    for at, second in enumerate(members):
        for first in members[:at]:
            yield first, second
