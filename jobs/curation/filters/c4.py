"""The rules of C4 (Raffel et al. 2020, section 2.2) that judge a page, and its rules of lines.

C4 takes out single lines and drops pages with too few sentences left. Here no text is changed: a
line that C4 would take out does not count towards the sentences. Its list of bad words is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from jobs.curation.filters._base import Filter, limited
from jobs.curation.text import Text

_ENDS = (".", "?", "!", '"', "'", "”", "’")

_SENTENCE = re.compile(r"[.?!]+[\"'”’)]*(?=\s|$)")

_BANNED = (
    "javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies",
    "use of cookies", "use cookies",
)  # fmt: skip

_LONGEST_WORD = 1000


def _is_kept(line: str) -> bool:
    """Whether C4 leaves the line in the page."""
    words, lower = line.split(), line.lower()
    return (
        line.endswith(_ENDS)
        and not line.endswith("...")
        and len(words) >= 3
        and max(map(len, words)) <= _LONGEST_WORD
        and not any(banned in lower for banned in _BANNED)
    )


def _measure(text: Text) -> Iterator[tuple[str, float]]:
    yield "max_curly_brackets", text.text.count("{")
    yield "max_lorem_ipsum", text.text.lower().count("lorem ipsum")
    kept = filter(_is_kept, text.lines)
    yield "min_sentences", sum(max(1, len(_SENTENCE.findall(line))) for line in kept)


FILTER = Filter(
    "C4's rules", limited(_measure), cost=1,
    limits={"max_curly_brackets": 0, "max_lorem_ipsum": 0, "min_sentences": 5},
)  # fmt: skip
