"""What a filter is, and the one kind that most are: measures that are held to limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from conf.options.curate import CurateConfig
from jobs.curation.overlap import Against
from jobs.curation.text import Text

__all__ = ["Against", "Drop", "Filter", "Judge", "Limits", "Measure", "limited", "ratio"]


@dataclass(frozen=True)
class Drop:
    """Why a document is not kept."""

    rule: str
    detail: str
    """the value and the limit, or what was found"""


Judge = Callable[[Text], Drop | None]

Limits = Mapping[str, float | None]
"""rule -> limit; None switches it off"""

Measure = Callable[[Text], Iterator[tuple[str, float]]]
"""(rule, value), cheap ones first; a rule is called min_ or max_ after what its limit is"""


@dataclass(frozen=True)
class Filter:
    """One file of `filters`: its `FILTER`."""

    summary: str
    make: Callable[[CurateConfig, Limits, Against | None], Judge]
    cost: int
    """rank: of those that are on, cheaper ones come first, and the first that objects counts"""
    limits: Limits = field(default_factory=dict)
    """its rules and their thresholds"""


def limited(measure: Measure) -> Callable[[CurateConfig, Limits, Against | None], Judge]:
    """The judge that holds what is measured to the limits; a limit itself is allowed."""

    def make(config: CurateConfig, limits: Limits, against: Against | None) -> Judge:
        def judge(text: Text) -> Drop | None:
            for rule, value in measure(text):
                limit = limits[rule]
                if limit is None:
                    continue
                is_low = rule.startswith("min_")
                if (value < limit) if is_low else (value > limit):
                    word = "less" if is_low else "more"
                    return Drop(rule, f"{value:.4g}, {word} than {limit:.4g}")
            return None

        return judge

    return make


def ratio(part: float, whole: float) -> float:
    """`part / whole`, 0 of nothing."""
    return part / whole if whole else 0.0


def repeated(items: Sequence[str]) -> tuple[int, int]:
    """How many items came before, and their characters."""
    seen: set[str] = set()
    count = chars = 0
    for item in items:
        if item in seen:
            count += 1
            chars += len(item)
        seen.add(item)
    return count, chars
