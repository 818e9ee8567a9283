"""Hashes of words in a row, and random numbers that a seed decides on every machine."""

from __future__ import annotations

from functools import cache

import numpy as np
import xxhash

from jobs.curation.text import Hashes, Text

NGRAM_WORDS = 5
"""of the shingles that near copies are found by"""


def random_words(*parts: object, count: int) -> Hashes:
    """uint64 (count,) that depend on the parts alone."""
    key = " ".join(map(str, parts))
    numbers = [xxhash.xxh64_intdigest(f"{key} {i}".encode()) for i in range(count)]
    return np.array(numbers, np.uint64)


def mixed(words: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def combined(columns: Hashes, name: str) -> Hashes:
    """One 64-bit word for each column of uint64 (n, ...): their multilinear hash, mixed."""
    factors = _factors(name, len(columns))
    total = columns[0] * factors[0]
    for column, factor in zip(columns[1:], factors[1:], strict=True):
        total += column * factor
    return mixed(total)


@cache
def _factors(name: str, count: int) -> Hashes:
    return random_words(name, count, count=count) | np.uint64(1)


def gram_hashes(hashes_W: Hashes, num_words: int) -> Hashes:
    """uint64 (W - num_words + 1,) of words in a row, num_words at a time; empty of fewer."""
    count = len(hashes_W) - num_words + 1
    if count < 1:
        return np.empty(0, np.uint64)
    return combined(np.stack([hashes_W[i : i + count] for i in range(num_words)]), "grams")


def shingles(text: Text, num_words: int = NGRAM_WORDS) -> Hashes:
    """The set of a text's n-grams: uint64, sorted, each once, never empty.

    A text of fewer words is one n-gram of all of them; one without words stands for itself.
    """
    grams = gram_hashes(text.hashes_W, num_words)
    if len(grams):
        return np.unique(grams)
    return np.array([text.digest[1]], np.uint64)
