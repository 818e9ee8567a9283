"""Words in a row that a document shares with evaluation texts.

As in the report on GPT-3 (Brown et al. 2020, appendix C): n-grams of n = 13 words, letters and
digits alone, case folded. Evaluation texts of fewer words, down to 8, count as one n-gram of all of
them. Deviation: a document with such an n-gram goes as a whole, however often the n-gram occurs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.curation.grams import gram_hashes
from jobs.curation.text import Hashes, Text

FEWEST_WORDS = 8
"""of an evaluation text that is looked for: shorter ones occur by chance"""


@dataclass(frozen=True)
class Against:
    """The n-grams of evaluation texts."""

    grams: dict[int, tuple[Hashes, NDArray[np.uint16]]]
    """number of words -> hashes, sorted, each once, and the source that each is of first"""
    num_short: int
    """texts that are too short to be looked for"""

    def find(self, text: Text) -> tuple[int, str] | None:
        """The source and the words of the first n-gram that is one of these; None where none is."""
        for num_words, (known, sources) in self.grams.items():
            found = gram_hashes(text.hashes_W, num_words)
            if not len(found):
                continue
            at = np.minimum(np.searchsorted(known, found), len(known) - 1)
            hits = np.flatnonzero(known[at] == found)
            if len(hits):
                first = int(hits[0])
                words = text.plain_words[first : first + num_words]
                return int(sources[at[first]]), " ".join(words)
        return None


def collect(texts: Iterable[tuple[int, str]], num_words: int) -> Against:
    """The n-grams of (source, evaluation text); 10 bytes a word.

    Args:
        texts: in the order of their sources.
        num_words: n; of shorter texts all words, from `FEWEST_WORDS` or n on.
    """
    found: dict[int, list[tuple[int, Hashes]]] = {}
    num_short = 0
    for source, plain in texts:
        hashes_W = Text(plain).hashes_W
        size = min(num_words, len(hashes_W))
        if size < min(FEWEST_WORDS, num_words):
            num_short += 1
            continue
        found.setdefault(size, []).append((source, gram_hashes(hashes_W, size)))
    grams = {}
    for size in sorted(found, reverse=True):
        every = np.concatenate([hashes for _, hashes in found[size]])
        sources = np.concatenate(
            [np.full(len(hashes), source, np.uint16) for source, hashes in found[size]]
        )
        known, at = np.unique(every, return_index=True)
        grams[size] = known, sources[at]
    return Against(grams, num_short)
