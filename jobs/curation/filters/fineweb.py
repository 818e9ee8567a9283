"""The rules that FineWeb adds to those of Gopher and C4 (Penedo et al. 2024, section 3.5).

For web pages: a text of few, short lines (a list, a poem, a dialogue) fails most of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from jobs.curation.filters._base import Filter, limited, ratio, repeated
from jobs.curation.text import Text

_ENDS = (".", "'", '"', "!", "?", "”", "’")

_SHORT_CHARS = 30


def _measure(text: Text) -> Iterator[tuple[str, float]]:
    lines = text.lines
    yield "min_lines_with_end", ratio(sum(line.endswith(_ENDS) for line in lines), len(lines))
    yield "max_short_lines", ratio(sum(len(line) <= _SHORT_CHARS for line in lines), len(lines))
    yield "max_duplicate_line_chars", ratio(repeated(lines)[1], sum(map(len, lines)))
    yield "max_lines_per_word", ratio(text.text.count("\n"), len(text.words))


FILTER = Filter(
    "FineWeb's rules", limited(_measure), cost=1,
    limits={
        "min_lines_with_end": 0.12, "max_short_lines": 0.67, "max_duplicate_line_chars": 0.01,
        "max_lines_per_word": 0.3,
    },
)  # fmt: skip
