"""Which documents of several sources are taken, and how often: by shares, sizes and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.curation.grams import mixed, random_words
from jobs.curation.text import Hashes
from sparsify.errors import InputError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Taken:
    """What the mix makes of one source."""

    counts_N: Ints
    """how often each of its documents is taken"""
    available: int
    """its size, in the unit of the mix"""
    wanted: float
    """what its share asks for"""
    taken: int


def take(shares: Sequence[float], sizes: Sequence[Ints], seed: int) -> list[Taken]:
    """Of each source its share; `sizes` of its documents in the unit that counts."""
    return [
        _taken(sizes_N, share * int(sizes_N.sum()), seed, number)
        for number, (share, sizes_N) in enumerate(zip(shares, sizes, strict=True))
    ]


def mix(
    names: Sequence[str], shares: Sequence[float], sizes: Sequence[Ints], total: int | None,
    when_short: str, seed: int,
) -> list[Taken]:  # fmt: skip
    """Take so much of each source that the result has these proportions.

    Args:
        names: of the sources, for messages.
        shares: of the result; sum to 1.
        sizes: of each source's documents, in the unit that counts.
        total: size of the result; None for the most that no source runs out of or, with repeat, the
            least that uses all of each.
        when_short: where a source has less than its share of `total`: shrink (the whole result is
            as large as the source that is shortest allows), repeat (its documents come again) or
            error.
        seed: decides which documents are taken; a smaller result is part of a larger one.

    Raises:
        InputError: a source has nothing, or with error too little.
    """
    available = [int(sizes_N.sum()) for sizes_N in sizes]
    for name, size in zip(names, available, strict=True):
        if not size:
            raise InputError(
                f"curate.sources: nothing is left of {name}, which is to be a part of the result; "
                "loosen its filters or leave it out"
            )
    reach = [size / share for size, share in zip(available, shares, strict=True)]
    if total is None:
        wanted_total = max(reach) if when_short == "repeat" else min(reach)
    elif when_short == "shrink":
        wanted_total = min(float(total), *reach)
    else:
        wanted_total = float(total)
    if when_short == "error" and min(reach) < wanted_total:
        at = int(np.argmin(reach))
        raise InputError(
            f"curate.total={total}: {names[at]} has {available[at]:,} and its share {shares[at]:g} "
            f"asks for {shares[at] * wanted_total:,.0f}; at most {min(reach):,.0f} can be had, or "
            "set curate.when_short to shrink or repeat"
        )
    return [
        _taken(sizes_N, share * wanted_total, seed, number)
        for number, (share, sizes_N) in enumerate(zip(shares, sizes, strict=True))
    ]


def _taken(sizes_N: Ints, wanted: float, seed: int, number: int) -> Taken:
    """All documents as often as they fit whole, then the first of a seeded order, as near as can be
    to what is wanted."""
    available = int(sizes_N.sum())
    whole = int(wanted / available + 1e-9) if available else 0
    counts_N = np.full(len(sizes_N), whole, np.int64)
    rest = wanted - whole * available
    keys: Hashes = np.arange(len(sizes_N), dtype=np.uint64)
    keys = keys + random_words("mix", seed, number, count=1)
    order = np.argsort(mixed(keys), kind="stable")
    reached = np.cumsum(sizes_N[order])
    if len(order) and rest > 0:
        best = int(np.argmin(np.abs(np.concatenate([[0], reached]) - rest)))
        counts_N[order[:best]] += 1
    return Taken(counts_N, available, wanted, int((counts_N * sizes_N).sum()))
