"""The drawings of the report page that go block by block: maps and curves over depth.

Inline SVG whose colours come from CSS variables. All of them place block i of n at (i + 0.5) / n of
the width. Every mark carries a <title>, which browsers show on hover and screen readers read out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from jobs import _format
from jobs._layers import Record, drawable, linear_kind, short_kinds
from jobs._svg import Scale, element, number, pct, polylines, tick_label

_CELL_HEIGHT = 22
_PALEST = 0.07  # opacity of the smallest value of a map
_NUM_TONES = 7  # colours of curves beside the main one; more curves than that repeat them
_DEPTH_HEIGHT = 190
_LONE = 0.25  # half the width of a block without neighbours, as a share of its place

Spell = Callable[[float | None], str]


@dataclass(frozen=True)
class LayerMap:
    """One map of blocks by linear layers: its heading, a one-line summary, and the drawing."""

    heading: str
    summary: str
    svg: Markup


@dataclass(frozen=True)
class DepthChart:
    """Curves over the blocks: (CSS class, name, one-line summary) of each, and the drawing."""

    legend: list[tuple[str, str, str]]
    svg: Markup
    has_area: bool
    """whether the main curve has an area around it"""
    has_band: bool
    """whether any of the range to be warned of is on the scale"""


def layer_map(
    heading: str,
    layers: list[Record],
    key: str,
    opacity: Callable[[float], float],
    spell: Spell,
) -> LayerMap:
    """Blocks from left to right, linear layers from top to bottom, darker for larger values.

    Several layers of one kind in one block (experts) share a cell, which shows the largest.

    Args:
        heading: what is shown, such as the name of a method.
        layers: dicts with name, block and `key`.
        key: which value.
        opacity: from a finite value to 0..1, shared by the maps that are to be compared.
        spell: the value as text, with its unit.
    """
    cells: dict[tuple[str, int], Record] = {}
    short = short_kinds(layers)
    kinds = list(short)
    for layer in layers:
        kind = linear_kind(layer["name"], layer["block"])
        held = cells.get((kind, layer["block"]))
        if held is None or _rank(layer.get(key)) > _rank(held.get(key)):
            cells[kind, layer["block"]] = layer
    blocks = sorted({block for _, block in cells})
    marks = [
        element("text", short[kind], class_="end", x="-8", y=_CELL_HEIGHT * row + 15)
        for row, kind in enumerate(kinds)
    ]
    for (kind, block), layer in cells.items():
        column, row = blocks.index(block), kinds.index(kind)
        marks.extend(_cell(layer, key, column, row, len(blocks), opacity, spell))
    marks.extend(block_axis(blocks, _CELL_HEIGHT * len(kinds)))
    gutter = min(16, max(len(text) for text in short.values()) + 1)
    label = f"{heading}: {len(layers)} layers by block and kind"
    svg = element(
        "svg", *marks, class_="plot map", role="img", aria_label=label,
        height=_CELL_HEIGHT * len(kinds) + 36, style=f"--gutter:{number(0.56 * gutter)}em",
    )  # fmt: skip
    return LayerMap(heading, summarize(layers, key, spell, short), svg)


def _rank(value: float | None) -> float:
    """Order for 'largest': a value that is not finite counts as worse than any number."""
    return value if value is not None and math.isfinite(value) else math.inf


def _cell(
    layer: Record, key: str, column: int, row: int, num_columns: int,
    opacity: Callable[[float], float], spell: Spell,
) -> list[Markup]:  # fmt: skip
    value = layer.get(key)
    title = element("title", f"{layer['name']}: {spell(value)}")
    place = {
        "x": pct(column / num_columns),
        "y": number(_CELL_HEIGHT * row),
        "width": pct(1 / num_columns),
        "height": str(_CELL_HEIGHT),
    }
    if not _format.is_drawable(value):
        return [element("rect", title, class_="missing", **place)]
    shade = _PALEST + (1 - _PALEST) * min(1.0, max(0.0, opacity(value)))
    marks = [element("rect", title, fill_opacity=shade, **place)]
    if num_columns <= 6:
        tone = "cell" + " deep" * (shade > 0.62) + " deepest" * (shade > 0.9)  # text contrast
        x = pct((column + 0.5) / num_columns)
        marks.append(element("text", spell(value), class_=tone, x=x, y=_CELL_HEIGHT * row + 15))
    return marks


def block_axis(blocks: list[int], height: int) -> list[Markup]:
    """The blocks' numbers under a drawing of this height, as many as have room."""
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(blocks) / s <= 9)
    marks = [
        element("text", str(block), class_="middle", x=pct((i + 0.5) / len(blocks)), y=height + 15)
        for i, block in enumerate(blocks)
        if i % stride == 0
    ]
    marks.append(element("text", "block", class_="end", x="100%", y=height + 32))
    return marks


def depth_chart(
    label: str,
    series: dict[str, list[Record]],
    key: str,
    spell: Spell,
    *,
    main: str | None = None,
    is_log: bool = True,
    low_is_bad: bool = False,
    warn: tuple[float, float] | None = None,
) -> DepthChart | None:
    """One curve per series: the median of each block's layers, over the blocks from first to last.

    The main series also has a shaded area from the smallest to the largest layer of each block.

    Args:
        label: what is drawn, for screen readers.
        series: name -> layers with name, block and `key`; those without any value are left out.
        key: which value.
        spell: the value as text, with its unit.
        main: the series that stands out.
        is_log: logarithmic axis; values that are not positive are gaps on it.
        low_is_bad: the summary names the smallest value, not the largest.
        warn: (from, to), the values to be warned of; drawn as far as they are on the scale.

    Returns:
        None if there is nothing that the axis can show.
    """
    columns = {name: _by_block(layers, key, is_log) for name, layers in series.items()}
    columns = {name: of_block for name, of_block in columns.items() if of_block}
    if not columns:
        return None
    kept = {name: series[name] for name in columns}
    blocks = sorted({layer["block"] for layers in kept.values() for layer in layers})
    shown = [statistics.median(v) for of_block in columns.values() for v in of_block.values()]
    shown += [value for values in columns.get(main or "", {}).values() for value in values]
    up = Scale.over(shown, is_log=is_log, pad=0.07)
    tones = _tones(list(columns), main)
    band = _warning_band(up, warn)
    marks = [
        *band,
        *_value_axis(up, tick_label if is_log else spell),
        _curves(columns, blocks, up, tones, main),
        *_hover_blocks(kept, key, spell, blocks, low_is_bad),
        *block_axis(blocks, _DEPTH_HEIGHT),
    ]
    svg = element(
        "svg", *marks, class_="plot depth", role="img", height=_DEPTH_HEIGHT + 36,
        aria_label=f"{label} over {len(blocks)} blocks",
    )  # fmt: skip
    short = short_kinds([layer for layers in kept.values() for layer in layers])
    legend = [
        (tones[name], name, summarize(layers, key, spell, short, low_is_bad))
        for name, layers in kept.items()
    ]
    return DepthChart(legend, svg, main in columns, bool(band))


def _curves(
    columns: dict[str, dict[int, list[float]]],
    blocks: list[int],
    up: Scale,
    tones: dict[str, str],
    main: str | None,
) -> Markup:
    """The medians of all series, the main one on top and over its area."""
    xs = [(i + 0.5) / len(blocks) for i in range(len(blocks))]
    lines = _areas(xs, blocks, columns[main], up) if main in columns else []
    for name in sorted(columns, key=lambda name: name == main):
        medians = [
            up(statistics.median(columns[name][b])) if b in columns[name] else None for b in blocks
        ]
        lines += polylines(xs, medians, f"curve {tones[name]}", _LONE / len(blocks))
    return element(
        "svg", *lines, width="100%", height=_DEPTH_HEIGHT, viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
    )  # fmt: skip


def _by_block(layers: list[Record], key: str, is_log: bool) -> dict[int, list[float]]:
    """Block -> the values that the axis can show."""
    of_block: dict[int, list[float]] = {}
    for layer in layers:
        value = layer.get(key)
        if _format.is_drawable(value) and (value > 0 or not is_log):
            of_block.setdefault(layer["block"], []).append(value)
    return of_block


def _tones(names: list[str], main: str | None) -> dict[str, str]:
    others = [name for name in names if name != main]
    tones = {name: f"t{1 + i % _NUM_TONES}" for i, name in enumerate(others)}
    return {name: tones.get(name, "t0") for name in names}


def _warning_band(up: Scale, warn: tuple[float, float] | None) -> list[Markup]:
    """The part of the scale that `warn` covers, from one side of the drawing to the other."""
    if warn is None or warn[1] <= up.low or warn[0] >= up.high:
        return []
    low, high = (min(1.0, max(0.0, up(max(edge, up.low)))) for edge in warn)
    height = _DEPTH_HEIGHT * (high - low)
    return [
        element(
            "rect", class_="band", x="0", width="100%", y=_DEPTH_HEIGHT * (1 - high), height=height
        )
    ]


def _value_axis(up: Scale, spell: Callable[[float], str]) -> list[Markup]:
    marks = []
    for tick in up.ticks(5):
        y = _DEPTH_HEIGHT * (1 - up(tick))
        marks.append(element("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        marks.append(element("text", spell(tick), class_="end", x="-8", y=y + 4))
    return marks


def _areas(
    xs: list[float], blocks: list[int], of_block: dict[int, list[float]], up: Scale
) -> list[Markup]:
    """From the smallest to the largest value of each block, broken where a block has none."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for x, block in zip(xs, blocks, strict=True):
        if block in of_block:
            values = of_block[block]
            runs[-1].append((x, up(min(values)), up(max(values))))
        else:
            runs.append([])
    areas = []
    for run in runs:
        if len(run) == 1:
            x, low, high = run[0]
            half = _LONE / len(blocks)
            run = [(x - half, low, high), (x + half, low, high)]
        edge = [(x, high) for x, _, high in run] + [(x, low) for x, low, _ in reversed(run)]
        points = " ".join(f"{number(1000 * x)},{number(1000 * (1 - y))}" for x, y in edge)
        if points:
            areas.append(element("polygon", class_="area", points=points))
    return areas


def _hover_blocks(
    series: dict[str, list[Record]], key: str, spell: Spell, blocks: list[int], low_is_bad: bool
) -> list[Markup]:
    """An invisible strip per block that says what every curve is there."""
    short = short_kinds([layer for layers in series.values() for layer in layers])
    strips = []
    for i, block in enumerate(blocks):
        lines = [f"block {block}"]
        for name, layers in series.items():
            here = [layer for layer in layers if layer["block"] == block]
            lines.append(f"{name}: {summarize(here, key, spell, short, low_is_bad)}")
        strips.append(
            element("rect", element("title", "\n".join(lines)), class_="hit",
                    x=pct(i / len(blocks)), width=pct(1 / len(blocks)), height=_DEPTH_HEIGHT)
        )  # fmt: skip
    return strips


def summarize(
    layers: list[Record], key: str, spell: Spell, short: dict[str, str], low_is_bad: bool = False
) -> str:
    """'median 0.041, largest 0.13 in block 3 down_proj', or that all are equal."""
    values = drawable(layers, key)
    missing = len(layers) - len(values)
    tail = f"; {missing} of {len(layers)} not finite or missing" if missing else ""
    if not values:
        return "no finite value"
    if spell(min(values)) == spell(max(values)):
        many = " in every layer" if len(layers) > 1 else ""
        return f"{spell(values[0])}{many}{tail}"
    extreme = min(values) if low_is_bad else max(values)
    worst = next(layer for layer in layers if layer.get(key) == extreme)
    where = short.get(linear_kind(worst["name"], worst["block"]), worst["name"])
    median, word = spell(statistics.median(values)), "smallest" if low_is_bad else "largest"
    return f"median {median}, {word} {spell(extreme)} in block {worst['block']} {where}{tail}"
