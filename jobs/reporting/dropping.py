"""Why layers were dropped: a map of distances or divergences by layer, for the page and as a file.

Colours and sizes are attributes of its elements, so that the drawing needs no style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from jobs.reporting import units
from jobs.reporting.svg import Scale, element, number

_WIDTH = 760.0

_LEFT, _BOTTOM = 96.0, 40.0

_COLOUR = "#1f6feb"

_PALEST = 0.06

_MOST_HEIGHT, _LEAST_HEIGHT = 22.0, 4.0

_ALL_ROWS = 480.0  # pixels that the rows of a deep model share

_ROOM_FOR_TEXT = 44.0


@dataclass(frozen=True)
class DropMap:
    """A map with its heading and a one-line summary."""

    heading: str
    summary: str
    svg: Markup
    height: float


def chart_of(figures: dict[str, Any]) -> DropMap | None:
    """The map of what a rule measured; None for one that measured nothing.

    Args:
        figures: of the stage's record: `distances` by block size and layer, or `rounds`.
    """
    if distances := figures.get("distances"):
        num = figures["num_layers_before"] - figures["num_layers"]
        gone = set(figures["dropped_layers"])
        rows = [
            (f"{size} in a row", list(values), min(gone) if size == num and gone else None)
            for size, values in enumerate(distances, 1)
        ]
        where = f"{units.significant(distances[num - 1][min(gone)])} for {_span(gone)}"
        return _map("Angular distance", f"of the residual stream over a block, in π; {where}", rows,
                    "first layer of the block")  # fmt: skip
    if rounds := figures.get("rounds"):
        rows = []
        for at, one in enumerate(rounds, 1):
            for part in dict.fromkeys(c["part"] for c in one["candidates"]):
                values: list[float | None] = [None] * figures["num_layers_before"]
                for candidate in one["candidates"]:
                    if candidate["part"] == part:
                        values[candidate["layer"]] = candidate["kl"]
                is_of = one["unit"]["part"] == part
                name = f"{at}." if part == "layers" else f"{at}. {part}"
                rows.append((name, values, one["unit"]["layer"] if is_of else None))
        last = units.significant(rounds[-1]["kl"])
        return _map("KL divergence", "without one candidate more, in nats per token; "
                    f"{last} without all that went", rows, "layer")  # fmt: skip
    return None


def standing_alone(chart: DropMap) -> str:
    """The map as an SVG file."""
    head = 30.0
    return str(
        element(
            "svg", element("rect", width="100%", height="100%", fill="#ffffff"),
            element("text", f"{chart.heading} {chart.summary}", x=8, y=20, fill="#1f2328"),
            element("g", chart.svg, transform=f"translate(0 {number(head)})"),
            xmlns="http://www.w3.org/2000/svg", width=_WIDTH, height=chart.height + head,
            font_family="sans-serif", font_size="12", color="#57606a", role="img",
            aria_label=chart.heading,
        )
    ) + "\n"  # fmt: skip


def _span(layers: set[int]) -> str:
    first, last = min(layers), max(layers)
    return f"layers {first} to {last}" if first < last else f"layer {first}"


def _map(
    heading: str, summary: str, rows: Sequence[tuple[str, Sequence[float | None], int | None]],
    across: str,
) -> DropMap:  # fmt: skip
    """Rows of cells, darker for larger values; the one that was chosen has a frame.

    Args:
        heading: what is shown.
        summary: the rest of the sentence.
        rows: (name, value of each layer, chosen layer) from top to bottom.
        across: what goes from left to right.
    """
    num_layers = max(len(values) for _, values, _ in rows)
    known = [v for _, values, _ in rows for v in values if v is not None and math.isfinite(v)]
    is_log = min(known, default=0) > 0
    scale = Scale.over(known, is_log=is_log) if known else Scale(0, 1, False)
    height = min(_MOST_HEIGHT, max(_LEAST_HEIGHT, _ALL_ROWS / len(rows)))
    width = (_WIDTH - _LEFT - 8) / num_layers
    stride = max(1, math.ceil(14 / height))
    marks = []
    for at, (name, values, chosen) in enumerate(rows):
        y = at * height
        if at % stride == 0:
            marks.append(_text(name, _LEFT - 8, y + min(height, 22) / 2 + 4, "end"))
        for layer, value in enumerate(values):
            if value is None:
                continue
            title = element("title", f"{name}, layer {layer}: {units.significant(value)}")
            shade = _PALEST + (1 - _PALEST) * max(0.0, min(1.0, scale(value)))
            frame = {"stroke": "#d1242f", "stroke_width": "2"} if layer == chosen else {}
            x = _LEFT + layer * width
            marks.append(
                element(
                    "rect", title, x=x + 1, y=y + 1, width=max(1.0, width - 2),
                    height=max(1.0, height - 2), fill=_COLOUR, fill_opacity=shade, **frame,
                )
            )  # fmt: skip
            if width > _ROOM_FOR_TEXT and height >= 16:
                tone = "#ffffff" if shade > 0.55 else "currentColor"
                marks.append(
                    _text(units.significant(value, 2), x + width / 2, y + height / 2 + 4, "middle",
                          tone)
                )  # fmt: skip
    below = len(rows) * height
    step = max(1, math.ceil(24 / width))
    marks += [
        _text(str(layer), _LEFT + (layer + 0.5) * width, below + 16, "middle")
        for layer in range(0, num_layers, step)
    ]
    marks.append(_text(across, _WIDTH - 8, below + 33, "end"))
    total = below + _BOTTOM
    svg = element(
        "svg", *marks, viewBox=f"0 0 {number(_WIDTH)} {number(total)}", width=_WIDTH, height=total,
        style="max-width:100%", font_size="12", role="img", aria_label=f"{heading} {summary}",
    )  # fmt: skip
    return DropMap(heading, summary, svg, total)


def _text(text: str, x: float, y: float, anchor: str, fill: str = "currentColor") -> Markup:
    # A style: the page's own rule for text in drawings would win over an attribute.
    return element("text", text, x=x, y=y, text_anchor=anchor, style=f"fill:{fill}")


def drop_section(dropping: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the page says of dropped layers; None for a run without them."""
    if not dropping:
        return None
    gone = dropping["dropped_layers"]
    share = 1 - dropping["num_weights"] / dropping["num_weights_before"]
    said = f"Rule {dropping['rule']}" if dropping["rule"] != "layers" else "As named"
    sentences = []
    if gone:
        sentences.append(
            f"{said}: {'layer' if len(gone) == 1 else 'layers'} {', '.join(map(str, gone))} of "
            f"{dropping['num_layers_before']} went, with {units.percent(share)} of the weights"
        )
    if dropping["dropped_sublayers"]:
        parts = ", ".join(f"{u['part']} of {u['layer']}" for u in dropping["dropped_sublayers"])
        sentences.append(f"{said}: {parts} give zeros, and take as much room as before")
    return {"sentences": sentences, "map": chart_of(dropping)}
