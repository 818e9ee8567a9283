"""A document as the filters look at it: its words, lines and hashes, each made once."""

from __future__ import annotations

import re
import unicodedata
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Scripts that put no spaces between words: a sign counts as a word.
_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"

_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")

_MOST_KEPT = 1 << 20  # words whose hashes are remembered: some 100 MB


class _WordHashes(dict[str, int]):
    """Word -> its 64 bits of XXH64; forgets all when there are too many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MOST_KEPT:
            self.clear()
        self[word] = found = xxhash.xxh64_intdigest(word.encode("utf-8", "surrogatepass"))
        return found


_hash_of: Any = _WordHashes()


class Text:
    """A document's text; what is computed of it stays, so that filters share it."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What stands between spaces, punctuation with it."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without the spaces around them."""
        return [line for line in map(str.strip, self.text.splitlines()) if line]

    @cached_property
    def plain_words(self) -> list[str]:
        """Letters and digits in a row (NFKC, case folded): what texts are compared by."""
        text = self.text if self.text.isascii() else unicodedata.normalize("NFKC", self.text)
        return _WORD.findall(text.casefold())

    @cached_property
    def hashes_W(self) -> Hashes:
        """uint64 (W,), one for each plain word."""
        words = self.plain_words
        return np.fromiter(map(_hash_of.__getitem__, words), np.uint64, len(words))

    @cached_property
    def digest(self) -> tuple[int, int]:
        """128 bits (XXH3) of the plain words, of the text itself where it has none."""
        same = " ".join(self.plain_words) or self.text.strip()
        found = xxhash.xxh3_128_intdigest(same.encode("utf-8", "surrogatepass"))
        return found >> 64, found & (2**64 - 1)
