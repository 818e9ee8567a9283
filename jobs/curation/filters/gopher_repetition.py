"""The repetition rules of Gopher (Rae et al. 2021, "Scaling Language Models", table A1).

Shares of characters are of those in words, without spaces and punctuation, so that no share depends
on how words are joined. Of duplicate n-grams a word counts once, however many of them it is in, and
only where the n-gram has come before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from jobs.curation.filters._base import Filter, limited, ratio, repeated
from jobs.curation.grams import gram_hashes
from jobs.curation.text import Text

_PARAGRAPHS = re.compile(r"\n\s*\n")

_TOP = {2: 0.20, 3: 0.18, 4: 0.16}

_DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def _measure(text: Text) -> Iterator[tuple[str, float]]:
    paragraphs = [part for part in map(str.strip, _PARAGRAPHS.split(text.text)) if part]
    for name, items in (("paragraph", paragraphs), ("line", text.lines)):
        count, chars = repeated(items)
        yield f"max_duplicate_{name}s", ratio(count, len(items))
        yield f"max_duplicate_{name}_chars", ratio(chars, sum(map(len, items)))
    words = text.plain_words
    chars_W = np.fromiter(map(len, words), np.int64, len(words))
    total = int(chars_W.sum())
    for size in _TOP:
        grams = gram_hashes(text.hashes_W, size)
        if not len(grams):
            return
        _, firsts, counts = np.unique(grams, return_index=True, return_counts=True)
        length = np.convolve(chars_W, np.ones(size, np.int64), "valid")[firsts]
        top = int((length * counts)[counts > 1].max(initial=0))
        yield f"max_top_{size}gram_chars", ratio(top, total)
    for size in _DUPLICATE:
        grams = gram_hashes(text.hashes_W, size)
        if not len(grams):
            return
        is_again = np.ones(len(grams), bool)
        is_again[np.unique(grams, return_index=True)[1]] = False
        is_covered = np.convolve(is_again, np.ones(size, np.int64)) > 0
        yield f"max_duplicate_{size}gram_chars", ratio(int(chars_W[is_covered].sum()), total)


FILTER = Filter(
    "Gopher's repetition rules", limited(_measure), cost=4,
    limits={
        "max_duplicate_paragraphs": 0.30, "max_duplicate_paragraph_chars": 0.20,
        "max_duplicate_lines": 0.30, "max_duplicate_line_chars": 0.20,
        **{f"max_top_{size}gram_chars": share for size, share in _TOP.items()},
        **{f"max_duplicate_{size}gram_chars": share for size, share in _DUPLICATE.items()},
    },
)  # fmt: skip
