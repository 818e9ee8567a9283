"""What the loss of a step is made of: weights, how they change over a run, and token counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sparsify.errors import InputError
from sparsify.params import LossWeights

if TYPE_CHECKING:  # the options read this file, without torch
    from sparsify.data.rows import TokenRows

_TERMS = ("kl", "reverse_kl", "ce", "square_head")


@dataclass(frozen=True)
class Ramp:
    """A straight line from a setting's value at the start of a run to `end`, constant after."""

    end: float
    share: float
    """share of the run after which `end` is reached; over 0, at most 1"""

    def at(self, start: float, progress: float) -> float:
        """The value after the share `progress` of the run, from `start` at 0."""
        return start + (self.end - start) * min(1.0, progress / self.share)


@dataclass(frozen=True)
class LossSchedule:
    """`LossWeights` as a function of how far the run is."""

    start: LossWeights
    ramps: dict[str, Ramp] = field(default_factory=dict)
    """field of LossWeights -> how it changes; the others stay"""

    def __post_init__(self) -> None:
        # Between two of these places every weight is a straight line above zero: if not all are
        # zero at the ends, they are not all zero in between.
        for progress in (0.0, 1.0, *(ramp.share for ramp in self.ramps.values())):
            self.at(progress)

    @classmethod
    def parse(cls, start: LossWeights, texts: Sequence[str]) -> LossSchedule:
        """A schedule from what `distill.schedule` holds: NAME:END@SHARE, one per setting.

        `square_head_weight:0@0.1` takes the weight from its value down to 0 over the first tenth of
        the run.

        Raises:
            InputError: unknown name, a name twice, or numbers out of range.
        """
        names = {f"{name}_weight": name for name in _TERMS} | {"temperature": "temperature"}
        ramps: dict[str, Ramp] = {}
        for text in texts:
            name, _, rest = text.partition(":")
            end, _, share = rest.partition("@")
            try:
                ramp = Ramp(float(end), float(share))
            except ValueError:
                ramp = Ramp(math.nan, math.nan)
            if not (math.isfinite(ramp.end) and 0 < ramp.share <= 1):
                raise InputError(
                    f"distill.schedule: {text!r} is not NAME:END@SHARE with a share of the run "
                    "over 0, at most 1; write for example square_head_weight:0@0.1"
                )
            if name not in names:
                raise InputError(
                    f"distill.schedule: {text!r} names {name!r}; use one of {', '.join(names)}"
                )
            if names[name] in ramps:
                raise InputError(f"distill.schedule: {name} is given twice")
            ramps[names[name]] = ramp
        return cls(start, ramps)

    def at(self, progress: float) -> LossWeights:
        """The weights after the share `progress` of the run, 0 to 1."""
        values = {n: ramp.at(getattr(self.start, n), progress) for n, ramp in self.ramps.items()}
        return replace(self.start, **values)

    def peak(self, name: str) -> float:
        """The largest value that a field of LossWeights takes."""
        start = float(getattr(self.start, name))
        return max(start, self.ramps[name].end) if name in self.ramps else start


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of positions that the terms of the loss are divided by."""

    kl: float
    """positions of the KL terms: all but the last of a document that ends inside its row"""
    ce: float
    """positions of the cross-entropy: those whose next token is of the same document"""

    @classmethod
    def of(cls, rows: TokenRows) -> TokenCounts:
        """The counts of some rows."""
        return cls(int(rows.is_taught_NT.sum()), int(rows.has_next_NT.sum()))

    def shared_by(self, num_parts: int) -> TokenCounts:
        """What each of `num_parts` micro-batches divides by, so that the mean of their losses is
        the loss of all their rows together."""
        return TokenCounts(self.kl / num_parts, self.ce / num_parts)
