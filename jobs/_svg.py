"""Escaped SVG elements, axis scales and ticks: what the charts of the report page are made of.

Knows nothing of runs or results. Horizontal positions are percentages, so that a chart takes any
width while its text keeps its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup, escape


def number(value: float, decimals: int = 2) -> str:
    """`value` without trailing zeros, for attributes."""
    text = f"{value:.{decimals}f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else text


def pct(share: float) -> str:
    """A share of the width as an SVG or CSS percentage."""
    return f"{number(100 * share)}%"


def element(tag: str, *children: str | Markup, **attributes: str | float) -> Markup:
    """One element; text and attribute values are escaped unless they are Markup already.

    A trailing underscore in an attribute name is dropped (`class_`), others become hyphens.
    """
    parts = []
    for key, value in attributes.items():
        text = number(value) if isinstance(value, (int, float)) else value
        parts.append(Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), text))
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup("").join(parts), inner)


def polylines(
    xs: list[float], ys: list[float | None], class_: str, lone: float = 0.0
) -> list[Markup]:
    """The curve through the points, broken where a value is missing. Coordinates: 0 to 1.

    A point without a neighbour becomes a stroke from `lone` before it to `lone` behind it.
    """
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    lines = []
    for run in runs:
        if len(run) == 1:
            x, y = run[0]
            run = [(x - lone, y), (x + lone, y)]
        points = " ".join(f"{number(1000 * x)},{number(1000 * (1 - y))}" for x, y in run)
        if points:
            lines.append(element("polyline", class_=class_, points=points))
    return lines


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` onto 0 to 1, by logarithm if `is_log`."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def over(cls, values: list[float], is_log: bool, pad: float = 0.0) -> Scale:
        """The scale that holds all `values` (drawable), with a share `pad` of room at each end.

        A logarithmic scale over values that are not all positive becomes a linear one. Equal
        values get room on both sides, so that the scale always has a width.
        """
        low, high = min(values), max(values)
        is_log = is_log and low > 0
        if is_log:
            low, high = math.log(low), math.log(high)
        if high - low < 1e-9 * max(1.0, abs(high)):
            room = 0.2 if is_log else 0.1 * (abs(high) or 1.0)
            low, high = low - room, high + room
        room = pad * (high - low)
        low, high = low - room, high + room
        return cls(math.exp(low), math.exp(high), True) if is_log else cls(low, high, False)

    def __call__(self, value: float) -> float:
        """Where `value` lies: 0 at `low`, 1 at `high`."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside the scale, at most `most` of them."""
        if self.is_log:
            for mantissas in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                marks = self._decade_marks(mantissas)
                if len(marks) <= most:
                    break
            else:
                marks = marks[:: math.ceil(len(marks) / most)]
            if len(marks) >= 3:
                return marks
        return self._linear_ticks(most)

    def _decade_marks(self, mantissas: tuple[float, ...]) -> list[float]:
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = [float(f"{m}e{e}") for e in exponents for m in mantissas]
        return [mark for mark in marks if self.low <= mark <= self.high]

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / max(1, most - 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A tick's value as short as it can be: 0.05, 7, 1,000, 2e-05."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{number(float(mantissa))}e{int(exponent)}"
    return f"{value:,.6f}".rstrip("0").rstrip(".")
