"""What is kept of judged shards: copies left out, sources mixed; on the driver, from arrays alone.

Documents are numbered through all shards in the order of curate.sources. Keys of all documents are
put together in one mapped file, so that memory does not hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.options.curate import CurateConfig, CurateJobConfig, shares_of
from conf.options.data import DataConfig
from jobs.curation.copies import exact_firsts, near_firsts
from jobs.curation.minhash import estimate, jaccard
from jobs.curation.mixing import Taken, mix, take
from jobs.workers.curate_shards import Judged, Shard, example, shard_texts
from sparsify.errors import InputError

Ints = NDArray[np.int64]

EXACT, NEAR, MIXING = "copies.exact", "copies.near", "mixing"

_COLUMN = {"characters": 1, "words": 2}


@dataclass(frozen=True)
class Report:
    """What was made of the corpus; plain values."""

    sources: list[dict[str, Any]]
    """of each source: what it had, what was dropped why, what is taken"""
    reasons: list[dict[str, Any]]
    """why documents were dropped, most first, with examples"""
    pairs: list[dict[str, Any]]
    """copies beside what they are copies of"""
    result: dict[str, int]
    """documents, characters and words that are kept"""


@dataclass(frozen=True)
class Choice:
    """Which records are written."""

    chosen: list[Ints]
    """of each shard int64 (N, 2): numbers of its records and how often each is written"""
    report: Report


class _Documents:
    """The documents that are left of all shards, by number."""

    def __init__(self, judged: Sequence[Judged], shards: Sequence[Shard]) -> None:
        self.judged = judged
        counts = [one.num_left for one in judged]
        self.edges = np.cumsum([0, *counts])
        self.count = int(self.edges[-1])
        self.records_N3 = self._joined("records", (0, 3))
        self.sources_N = np.repeat([shard.source for shard in shards], counts).astype(np.int64)

    def _joined(self, name: str, empty: tuple[int, ...]) -> NDArray[Any]:
        arrays = [one.array(name) for one in self.judged if one.num_left]
        return np.concatenate(arrays) if arrays else np.empty(empty, np.int64)

    @property
    def digests_N2(self) -> NDArray[np.uint64]:
        return self._joined("digests", (0, 2))

    def place(self, number: int) -> tuple[int, int]:
        """Its shard, and its number among those that are left of it."""
        shard = int(np.searchsorted(self.edges, number, side="right")) - 1
        return shard, number - int(self.edges[shard])

    def set_of(self, number: int) -> NDArray[Any]:
        shard, inner = self.place(number)
        return self.judged[shard].set_of(inner)

    def mapped_keys(self, path: Path) -> NDArray[np.uint64]:
        """uint64 (B, N) of all documents, in a file."""
        some = [one for one in self.judged if one.num_left]
        shape = len(some[0].array("keys")), self.count
        keys_BN = np.lib.format.open_memmap(path, "w+", np.uint64, shape)
        begin = 0
        for one in some:
            keys_BN[:, begin : begin + one.num_left] = one.array("keys")
            begin += one.num_left
        return keys_BN


def choose(
    config: CurateJobConfig, shards: Sequence[Shard], judged: Sequence[Judged],
    labels: Sequence[str], state: Path,
) -> Choice:  # fmt: skip
    """Find copies, take what the shares ask for, and count what became of every document.

    Args:
        config: with absolute paths.
        shards: all.
        judged: the same, judged.
        labels: names of the sources.
        state: a folder for a large file.

    Raises:
        InputError: nothing is left, or too little of a source.
    """
    curate = config.curate
    documents = _Documents(judged, shards)
    if not documents.count:
        _nothing_left(judged)
    is_kept, firsts = _without_copies(curate, documents, state)
    taken = _mixed(curate, documents, is_kept, labels)
    counts_N = np.zeros(documents.count, np.int64)
    for source, one in enumerate(taken):
        counts_N[np.flatnonzero(is_kept & (documents.sources_N == source))] = one.counts_N
    chosen = []
    for begin, end in zip(documents.edges[:-1], documents.edges[1:], strict=True):
        both = np.stack([documents.records_N3[begin:end, 0], counts_N[begin:end]], 1)
        chosen.append(both[both[:, 1] > 0])
    copies = {
        name: np.flatnonzero(firsts_N < np.arange(documents.count))
        for name, firsts_N in firsts.items()
    }
    copies[MIXING] = np.flatnonzero(is_kept & (counts_N == 0))
    report = Report(
        _source_facts(shares_of(curate), shards, judged, documents, copies, taken, labels),
        _reason_facts(judged, documents, copies, curate.num_examples),
        _shown_pairs(curate, config.data, shards, documents, firsts),
        {
            "documents": int(counts_N.sum()),
            **{
                name: int((counts_N * documents.records_N3[:, column]).sum())
                for name, column in _COLUMN.items()
            },
        },
    )
    return Choice(chosen, report)


def _nothing_left(judged: Sequence[Judged]) -> None:
    total = sum(one.facts["documents"] for one in judged)
    counts: dict[str, int] = {}
    for one in judged:
        for reason, facts in one.facts["dropped"].items():
            counts[reason] = counts.get(reason, 0) + facts["documents"]
    most = max(counts, key=lambda reason: counts[reason], default="")
    why = f"; {counts[most]:,} were dropped by {most}" if most else ""
    raise InputError(
        f"curate: nothing is left of {total:,} documents{why}; loosen the filters, or look for "
        "another source"
    )


def _without_copies(
    config: CurateConfig, documents: _Documents, state: Path
) -> tuple[NDArray[np.bool_], dict[str, Ints]]:
    """Which documents are no copies, and by kind of copy the first of each document's like."""
    is_kept = np.ones(documents.count, bool)
    numbers_N = np.arange(documents.count)
    firsts: dict[str, Ints] = {}
    if config.exact:
        firsts[EXACT] = exact_firsts(documents.digests_N2)
        is_kept &= firsts[EXACT] == numbers_N
    if config.near is not None:
        path = state / "keys.npy"
        firsts[NEAR] = near_firsts(
            documents.mapped_keys(path), np.flatnonzero(is_kept),
            lambda first, second: _similarity(config, documents, first, second), config.near,
        )  # fmt: skip
        path.unlink()
        is_kept &= firsts[NEAR] == numbers_N
    return is_kept, firsts


def _similarity(config: CurateConfig, documents: _Documents, first: int, second: int) -> float:
    compare = jaccard if config.verify == "exact" else estimate
    return compare(documents.set_of(first), documents.set_of(second))


def _mixed(
    config: CurateConfig, documents: _Documents, is_kept: NDArray[np.bool_], labels: Sequence[str]
) -> list[Taken]:
    """What is taken of each source."""
    column = _COLUMN.get(config.unit)
    sizes_N = np.ones(documents.count, np.int64)
    if column is not None:
        sizes_N = documents.records_N3[:, column]
    shares = [share for share, _ in shares_of(config)]
    sizes = [sizes_N[is_kept & (documents.sources_N == number)] for number in range(len(shares))]
    if config.mixing == "take":
        return take(shares, sizes, config.seed)
    return mix(labels, shares, sizes, config.total, config.when_short, config.seed)


def _source_facts(
    shares: Sequence[tuple[float, str]], shards: Sequence[Shard], judged: Sequence[Judged],
    documents: _Documents, copies: dict[str, Ints], taken: Sequence[Taken], labels: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    found = []
    for number, (share, _) in enumerate(shares):
        own = [one for one, s in zip(judged, shards, strict=True) if s.source == number]
        dropped: dict[str, int] = {}
        for one in own:
            for reason, facts in one.facts["dropped"].items():
                dropped[reason] = dropped.get(reason, 0) + facts["documents"]
        for reason, numbers in copies.items():
            if count := int((documents.sources_N[numbers] == number).sum()):
                dropped[reason] = count
        one_taken = taken[number]
        found.append(
            {
                "name": labels[number], "share": share,
                **{k: sum(one.facts[k] for one in own)
                   for k in ("documents", "characters", "words")},
                "dropped": dict(sorted(dropped.items())),
                "available": one_taken.available, "wanted": one_taken.wanted,
                "taken": one_taken.taken,
                "documents_taken": int(one_taken.counts_N.sum()),
                "most_repeats": int(one_taken.counts_N.max(initial=0)),
            }
        )  # fmt: skip
    return found


def _reason_facts(
    judged: Sequence[Judged], documents: _Documents, copies: dict[str, Ints], num_examples: int
) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for one in judged:
        for reason, facts in one.facts["dropped"].items():
            sums = found.setdefault(reason, {"documents": 0, "characters": 0, "examples": []})
            sums["documents"] += facts["documents"]
            sums["characters"] += facts["characters"]
            room = num_examples - len(sums["examples"])
            sums["examples"] += facts["examples"][:room]
    for reason, numbers in copies.items():
        if len(numbers):
            characters = int(documents.records_N3[numbers, 1].sum())
            found[reason] = {"documents": len(numbers), "characters": characters, "examples": []}
    order = sorted(found, key=lambda reason: (-found[reason]["documents"], reason))
    return [{"reason": reason, **found[reason]} for reason in order]


def _shown_pairs(
    config: CurateConfig, data: DataConfig, shards: Sequence[Shard], documents: _Documents,
    firsts: dict[str, Ints],
) -> list[dict[str, Any]]:  # fmt: skip
    """The first copies of each kind beside the documents that stay for them.

    Their shards are read again. Similarity is that of the two: in a chain of copies it may be less
    than the threshold, which each is from its next.
    """
    shown = [
        (kind, int(firsts_N[second]), second)
        for kind, firsts_N in firsts.items()
        for second in np.flatnonzero(firsts_N < np.arange(documents.count)).tolist()[
            : config.num_examples
        ]
    ]
    wanted: dict[int, dict[int, int]] = {}  # shard -> record -> document
    for number in {number for _, *pair in shown for number in pair}:
        shard, _ = documents.place(number)
        wanted.setdefault(shard, {})[int(documents.records_N3[number, 0])] = number
    examples: dict[int, dict[str, str]] = {}
    for index, records in wanted.items():
        texts = enumerate(shard_texts(shards[index], config, data))
        for record, (place, _, text) in islice(texts, max(records) + 1):
            if record in records:
                examples[records[record]] = example(place, text.text)
    return [
        {
            "reason": kind,
            "similarity": _similarity(config, documents, *pair) if kind == NEAR else 1.0,
            "kept": examples[pair[0]],
            "dropped": examples[pair[1]],
        }
        for kind, *pair in shown
    ]
