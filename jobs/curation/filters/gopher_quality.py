"""The quality rules of Gopher (Rae et al. 2021, "Scaling Language Models", appendix A.1.1).

Words are what stands between spaces. Deviation: a bullet may also be a hyphen or an asterisk before
a space, which is what most texts have today.
"""

from __future__ import annotations

from collections.abc import Iterator

from jobs.curation.filters._base import Filter, limited, ratio
from jobs.curation.text import Text

_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}

_BULLETS = ("•", "‣", "◦", "- ", "* ")

_ELLIPSES = ("...", "…")

_EDGES = ".,;:!?\"'()[]{}“”‘’"


def _measure(text: Text) -> Iterator[tuple[str, float]]:
    words, lines = text.words, text.lines
    yield "min_words", len(words)
    yield "max_words", len(words)
    mean = ratio(sum(map(len, words)), len(words))
    yield "min_mean_word_chars", mean
    yield "max_mean_word_chars", mean
    yield "max_hashes_per_word", ratio(text.text.count("#"), len(words))
    yield "max_ellipses_per_word", ratio(sum(map(text.text.count, _ELLIPSES)), len(words))
    yield "max_bullet_lines", ratio(sum(line.startswith(_BULLETS) for line in lines), len(lines))
    yield "max_ellipsis_lines", ratio(sum(line.endswith(_ELLIPSES) for line in lines), len(lines))
    lettered = sum(any(map(str.isalpha, word)) for word in words)
    yield "min_words_with_letter", ratio(lettered, len(words))
    yield "min_stop_words", sum(word.lower().strip(_EDGES) in _STOP_WORDS for word in words)


FILTER = Filter(
    "Gopher's quality rules", limited(_measure), cost=1,
    limits={
        "min_words": 50, "max_words": 100_000, "min_mean_word_chars": 3, "max_mean_word_chars": 10,
        "max_hashes_per_word": 0.1, "max_ellipses_per_word": 0.1, "max_bullet_lines": 0.9,
        "max_ellipsis_lines": 0.3, "min_words_with_letter": 0.8, "min_stop_words": 2,
    },
)  # fmt: skip
