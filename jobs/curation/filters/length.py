"""Documents that are too short or too long, in characters or words."""

from __future__ import annotations

from collections.abc import Iterator

from conf.options.curate import CurateConfig
from jobs.curation.filters._base import Against, Filter, Judge, Limits, limited
from jobs.curation.text import Text

_RULES = ("min_chars", "max_chars", "min_words", "max_words")


def _measure(text: Text) -> Iterator[tuple[str, float]]:
    yield "min_chars", len(text.text)
    yield "max_chars", len(text.text)
    yield "min_words", len(text.words)
    yield "max_words", len(text.words)


def _make(config: CurateConfig, limits: Limits, against: Against | None) -> Judge:
    return limited(_measure)(config, {rule: getattr(config, rule) for rule in _RULES}, against)


FILTER = Filter("too short or too long", _make, cost=0)
