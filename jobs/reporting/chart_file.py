"""A benchmark's curves as an SVG file that stands alone, with its colours and words in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from markupsafe import Markup

from jobs.reporting.svg import Scale, element, number, tick_label

_WIDTH, _HEIGHT = 760.0, 400.0

_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 190.0, 44.0, 52.0  # margins: ticks, names of curves, title

_COLOURS = (
    "#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#0a7ea4", "#cf4a92", "#57606a",
    "#953800", "#116329",
)  # fmt: skip

_LABEL_HEIGHT = 16.0


class Curves(Protocol):
    """What is drawn: see `jobs.benchmarks.support.record.Chart`."""

    @property
    def title(self) -> str: ...

    @property
    def across(self) -> str: ...

    @property
    def places(self) -> Sequence[float]: ...

    @property
    def curves(self) -> dict[str, Sequence[float | None]]: ...


def chart_file(chart: Curves) -> str:
    """The whole file. Both axes are logarithmic; every curve has a point at each of its places."""
    known = [value for values in chart.curves.values() for value in values if value is not None]
    across = Scale.over(list(chart.places), is_log=True)
    up = Scale.over([*known, 1.0], is_log=True, pad=0.04)
    parts = [
        element("rect", width="100%", height="100%", fill="#ffffff"),
        element("text", chart.title, x=_LEFT, y=22.0, font_size="15", fill="#1f2328"),
        *_grid(chart, across, up),
    ]
    ends = []
    for colour, (name, values) in zip(_COLOURS, chart.curves.items(), strict=False):
        points = [
            (_x(across(place)), _y(up(value)))
            for place, value in zip(chart.places, values, strict=True)
            if value is not None
        ]
        spelt = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        parts.append(
            element("polyline", points=spelt, fill="none", stroke=colour, stroke_width="2")
        )
        parts += [element("circle", cx=x, cy=y, r="3", fill=colour) for x, y in points]
        if points:
            ends.append((points[-1][1], name, colour))
    below = 0.0
    for y, name, colour in sorted(ends):  # names of curves that end close by move apart
        below = max(y + 4, below + _LABEL_HEIGHT)
        parts.append(element("text", name, x=_WIDTH - _RIGHT + 10, y=below, fill=colour))
    return str(
        element(
            "svg", *parts, xmlns="http://www.w3.org/2000/svg", width=_WIDTH, height=_HEIGHT,
            viewBox=f"0 0 {number(_WIDTH)} {number(_HEIGHT)}", font_family="sans-serif",
            font_size="12", role="img", aria_label=chart.title,
        )
    ) + "\n"  # fmt: skip


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _grid(chart: Curves, across: Scale, up: Scale) -> list[Markup]:
    """Lines and labels of both axes; the line of 1 is darker."""
    parts = []
    for tick in up.ticks(8):
        y = _y(up(tick))
        stroke = "#57606a" if tick == 1 else "#d8dee4"
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, stroke=stroke))
        parts.append(
            element(
                "text", tick_label(tick), x=_LEFT - 8, y=y + 4, text_anchor="end", fill="#57606a"
            )
        )
    for place in chart.places:
        parts.append(
            element(
                "text", tick_label(place), x=_x(across(place)), y=_HEIGHT - _BOTTOM + 18,
                text_anchor="middle", fill="#57606a",
            )
        )  # fmt: skip
    name = element(
        "text", chart.across, x=_WIDTH - _RIGHT, y=_HEIGHT - 14, text_anchor="end", fill="#57606a"
    )
    return [*parts, name]
