"""MinHash: sets of n-grams as short signatures that agree as often as the sets do.

Broder (1997), "On the resemblance and containment of documents": for a random order of all n-grams
the first ones of two sets are equal with the probability J(A, B) = |A and B| / |A or B|. The orders
are affine maps x -> a x + b mod 2^64 with odd a, which are bijections, of hashes that are mixed
already; such maps are no fully random orders, and a test holds the estimate to the variance
J (1 - J) / K.
Shape suffixes: K hashes, B bands, N documents.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from jobs.curation.grams import combined, random_words
from jobs.curation.text import Hashes

Signature = NDArray[np.uint32]

_BLOCK = 4096  # n-grams at a time, so that a book takes the memory of a page

RECALL = 0.99
"""chance of a pair at the threshold to become a candidate"""


class MinHash:
    """Signatures of `num_hashes` orders that a seed decides, cut into bands for a threshold.

    Args:
        num_hashes: K.
        threshold: Jaccard similarity, from which pairs are to be found.
        seed: of the orders.
    """

    def __init__(self, num_hashes: int, threshold: float, seed: int) -> None:
        self.num_hashes = num_hashes
        self.num_bands, self.num_rows = bands(num_hashes, threshold)
        numbers = random_words("minhash", seed, count=2 * num_hashes)
        self._factors_K = numbers[:num_hashes] | np.uint64(1)
        self._offsets_K = numbers[num_hashes:]

    def signature(self, grams: Hashes) -> Signature:
        """uint32 (K,): the upper halves of each order's smallest value; `grams` is not empty."""
        least_K = np.full(self.num_hashes, np.iinfo(np.uint64).max, np.uint64)
        for begin in range(0, len(grams), _BLOCK):
            some = grams[begin : begin + _BLOCK, None] * self._factors_K + self._offsets_K
            np.minimum(least_K, some.min(0), out=least_K)
        return (least_K >> np.uint64(32)).astype(np.uint32)

    def band_keys(self, signature_K: Signature) -> Hashes:
        """uint64 (B,): documents that agree in a whole band have its key in common."""
        rows = signature_K[: self.num_bands * self.num_rows].reshape(self.num_bands, self.num_rows)
        return combined(rows.T.astype(np.uint64), "bands") + self._band_numbers

    @cached_property
    def _band_numbers(self) -> Hashes:
        return np.arange(self.num_bands, dtype=np.uint64)


def bands(num_hashes: int, threshold: float) -> tuple[int, int]:
    """(B, rows of a band): as many rows as still find a pair at the threshold 99 times in 100.

    A pair of similarity J becomes a candidate with the probability 1 - (1 - J^rows)^B. Fewer rows
    would find more pairs and verify many more that are none.
    """
    best = num_hashes, 1
    for num_rows in range(2, num_hashes + 1):
        num_bands = num_hashes // num_rows
        if 1 - (1 - threshold**num_rows) ** num_bands >= RECALL:
            best = num_bands, num_rows
    return best


def estimate(first_K: Signature, second_K: Signature) -> float:
    """The share of hashes that agree: J on average, with the variance J (1 - J) / K."""
    return float((first_K == second_K).mean())


def jaccard(first: Hashes, second: Hashes) -> float:
    """Of two sets that are sorted and not empty, exactly."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)
