"""What the drawings of the page share: SVG elements, scales, curves, axes, and hover texts.

Places are shares of the drawing, from 0 to 1, upwards and to the right; heights are CSS pixels. A
drawing is as wide as its column: text keeps its size, and only the curves stretch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_Point = tuple[float, ...]

AXIS_HEIGHT = 38  # pixels below a drawing for the labels of its axis and the axis' name


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
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for mantissas in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                marks = [float(f"{m}e{e}") for e in range(low, high + 1) for m in mantissas]
                marks = [mark for mark in marks if self.low <= mark <= self.high]
                if len(marks) <= most:
                    break
            else:
                marks = marks[:: math.ceil(len(marks) / most)]
            if len(marks) >= 3:
                return marks
        rough = (self.high - self.low) / max(1, most - 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, last + 1)]

    def labels(self, most: int = 6) -> list[tuple[float, str]]:
        """(place, text) of each tick."""
        return [(self(tick), tick_label(tick)) for tick in self.ticks(most)]


def tick_label(value: float) -> str:
    """A tick's value as short as it can be: 0.05, 7, 1,000, 2e-05."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{number(float(mantissa))}e{int(exponent)}"
    return f"{value:,.6f}".rstrip("0").rstrip(".")


def polylines(
    xs: Iterable[float], ys: Iterable[float | None], class_: str, lone: float = 0.0
) -> list[Markup]:
    """The curve through the points, broken where a value is missing.

    A point without a neighbour becomes a stroke that reaches `lone` to either side of it.
    """
    points: list[_Point | None] = [
        None if y is None else (x, y) for x, y in zip(xs, ys, strict=True)
    ]
    return [element("polyline", class_=class_, points=_spell(run)) for run in _runs(points, lone)]


def areas(
    xs: Iterable[float],
    spans: Iterable[tuple[float, float] | None],
    class_: str,
    lone: float = 0.0,
) -> list[Markup]:
    """What lies between the lower and the upper end of each span, broken as `polylines` is."""
    points: list[_Point | None] = [
        None if span is None else (x, *span) for x, span in zip(xs, spans, strict=True)
    ]
    found = []
    for run in _runs(points, lone):
        outline: list[_Point] = [(x, high) for x, _, high in run]
        outline += [(x, low) for x, low, _ in reversed(run)]
        found.append(element("polygon", class_=class_, points=_spell(outline)))
    return found


def _runs(points: list[_Point | None], lone: float) -> list[list[_Point]]:
    """The points between the gaps; one that is alone becomes two, `lone` before and after it."""
    runs: list[list[_Point]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [
        [(x + side, *rest) for side in (-lone, lone) for x, *rest in run] if len(run) == 1 else run
        for run in runs
        if run
    ]


def _spell(points: Iterable[_Point]) -> str:
    """Points for the stretched box, which is 1000 by 1000 with its origin at the top left."""
    return " ".join(f"{number(1000 * x)},{number(1000 * (1 - y))}" for x, y in points)


def plot(
    label: str,
    height: int,
    up: Scale,
    curves: list[Markup],
    *,
    marks: Sequence[Markup] = (),
    axis: Sequence[Markup] = (),
    spell: Callable[[float], str] = tick_label,
) -> Markup:
    """A drawing over a scale of values: its grid, `curves` that stretch, and marks that do not.

    Args:
        label: what is drawn, for screen readers.
        height: pixels, without the axis below.
        up: the scale of the values; its ticks are written left of the drawing.
        curves: from `polylines` and `areas`.
        marks: what lies over them, such as `end_label` and `hover_strips`.
        axis: from `axis_below`; room for it is left only where it is given.
        spell: a tick as text.
    """
    grid = []
    for tick in up.ticks(5 if height > 120 else 3):
        y = height * (1 - up(tick))
        grid.append(element("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        grid.append(element("text", spell(tick), class_="end", x="-8", y=y + 4))
    stretched = element(
        "svg", *curves, width="100%", height=height, viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
    )  # fmt: skip
    return element(
        "svg", *grid, stretched, *marks, *axis, class_="plot", role="img", aria_label=label,
        height=height + (AXIS_HEIGHT if axis else 6),
    )  # fmt: skip


def axis_below(labels: Iterable[tuple[float, str]], name: str, height: int) -> list[Markup]:
    """(place, text) of each label under a drawing of this height, and the axis' name."""
    marks = [
        element("text", text, class_="middle", x=pct(place), y=height + 16)
        for place, text in labels
    ]
    return [*marks, element("text", name, class_="end", x="100%", y=height + 33)]


def end_label(value: float, text: str, up: Scale, height: int) -> Markup:
    """`text` to the right of the drawing, as high as a curve that ends at `value`."""
    y = min(height - 2.0, max(10.0, height * (1 - up(value)) + 4))
    return element("text", text, class_="value", x="100%", dx="8", y=y)


def hover_strips(edges: list[float], texts: list[str], height: int) -> list[Markup]:
    """An invisible strip between each two edges that says its text where a pointer rests on it."""
    return [
        element(
            "rect", element("title", text), class_="hit", x=pct(left), width=pct(right - left),
            height=height,
        )
        for (left, right), text in zip(itertools.pairwise(edges), texts, strict=True)
    ]  # fmt: skip
