"""Drawings of linear layers: maps of blocks by kinds of layers, and curves over the depth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from jobs.reporting import units
from jobs.reporting.layers import Record, drawable, linear_kind, rank, short_kinds
from jobs.reporting.svg import (
    AXIS_HEIGHT,
    Scale,
    areas,
    axis_below,
    element,
    hover_strips,
    number,
    pct,
    plot,
    polylines,
    tick_label,
)

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
        place = linear_kind(layer["name"], layer["block"]), layer["block"]
        if place not in cells or rank(layer.get(key)) > rank(cells[place].get(key)):
            cells[place] = layer
    blocks = sorted({block for _, block in cells})
    marks = [
        element("text", short[kind], class_="end", x="-8", y=_CELL_HEIGHT * row + 15)
        for row, kind in enumerate(kinds)
    ]
    for (kind, block), layer in cells.items():
        left, y = blocks.index(block) / len(blocks), _CELL_HEIGHT * kinds.index(kind)
        value = layer.get(key)
        shade = None
        if units.is_drawable(value):
            shade = _PALEST + (1 - _PALEST) * min(1.0, max(0.0, opacity(value)))
        text = spell(value)
        marks.extend(_cell(f"{layer['name']}: {text}", text, shade, (left, y), 1 / len(blocks)))
    height = _CELL_HEIGHT * len(kinds)
    gutter = min(16, max(len(text) for text in short.values()) + 1)
    svg = element(
        "svg", *marks, *_block_axis(blocks, height), class_="plot map", role="img",
        aria_label=f"{heading}: {len(layers)} layers by block and kind",
        height=height + AXIS_HEIGHT, style=f"--gutter:{number(0.56 * gutter)}em",
    )  # fmt: skip
    return LayerMap(heading, summarize(layers, key, spell, short), svg)


def _cell(
    title: str, text: str, shade: float | None, corner: tuple[float, int], width: float
) -> list[Markup]:
    """A cell of a map, with its value where there is room; without a shade it has no value."""
    left, y = corner
    colour = {"class_": "missing"} if shade is None else {"fill_opacity": shade}
    rect = element(
        "rect", element("title", title), **colour,
        x=pct(left), y=number(y), width=pct(width), height=_CELL_HEIGHT,
    )  # fmt: skip
    if shade is None or width < 1 / 6:
        return [rect]
    tone = "cell" + " deep" * (shade > 0.62) + " deepest" * (shade > 0.9)  # text contrast
    return [rect, element("text", text, class_=tone, x=pct(left + width / 2), y=y + 15)]


def _block_axis(blocks: list[int], height: int) -> list[Markup]:
    """The blocks' numbers under a drawing of this height, as many as have room."""
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(blocks) / s <= 9)
    places = _middles(blocks)
    labels = [(places[i], str(blocks[i])) for i in range(0, len(blocks), stride)]
    return axis_below(labels, "block", height)


def _middles(blocks: list[int]) -> list[float]:
    return [(i + 0.5) / len(blocks) for i in range(len(blocks))]


def depth_chart(
    label: str,
    series: dict[str, list[Record]],
    key: str,
    spell: Spell,
    *,
    main: str | None = None,
    is_share: bool = False,
    warn_above: float = math.inf,
) -> DepthChart | None:
    """One curve per series: the median of each block's layers, over the blocks from first to last.

    The main series also has a shaded area from the smallest to the largest layer of each block.

    Args:
        label: what is drawn, for screen readers.
        series: name -> layers with name, block and `key`; those without any value are left out.
        key: which value.
        spell: the value as text, with its unit.
        main: the series that stands out.
        is_share: the values are shares of which the smallest is the worst, on a linear axis; else
            the largest is, on a logarithmic one, where values that are not positive are gaps.
        warn_above: where values to be warned of start; that part of the scale is shaded.

    Returns:
        None if there is nothing that the axis can show.
    """
    columns = {name: _by_block(layers, key, is_share) for name, layers in series.items()}
    columns = {name: of_block for name, of_block in columns.items() if of_block}
    if not columns:
        return None
    kept = {name: series[name] for name in columns}
    every = [layer for layers in kept.values() for layer in layers]
    short, blocks = short_kinds(every), sorted({layer["block"] for layer in every})
    shown = [statistics.median(v) for of_block in columns.values() for v in of_block.values()]
    shown += [value for values in columns.get(main or "", {}).values() for value in values]
    up = Scale.over(shown, is_log=not is_share, pad=0.07)
    tones = _tones(list(columns), main)
    has_band = warn_above < up.high
    curves = areas((0, 1), [(max(0.0, up(warn_above)), 1.0)] * 2, "band") if has_band else []
    curves += _curves(columns, blocks, up, tones, main)

    def told(layers: list[Record]) -> str:
        return summarize(layers, key, spell, short, is_share)

    texts = [
        "\n".join([
            f"block {block}",
            *(f"{name}: {told([r for r in kept[name] if r['block'] == block])}" for name in kept),
        ])
        for block in blocks
    ]  # fmt: skip
    edges = [i / len(blocks) for i in range(len(blocks) + 1)]
    svg = plot(
        f"{label} over {len(blocks)} blocks", _DEPTH_HEIGHT, up, curves,
        marks=hover_strips(edges, texts, _DEPTH_HEIGHT), axis=_block_axis(blocks, _DEPTH_HEIGHT),
        spell=spell if is_share else tick_label,
    )  # fmt: skip
    legend = [(tones[name], name, told(layers)) for name, layers in kept.items()]
    return DepthChart(legend, svg, main in columns, has_band)


def _curves(
    columns: dict[str, dict[int, list[float]]],
    blocks: list[int],
    up: Scale,
    tones: dict[str, str],
    main: str | None,
) -> list[Markup]:
    """The medians of all series, the main one on top and over its area."""
    xs, lone = _middles(blocks), _LONE / len(blocks)
    lines: list[Markup] = []
    if main in columns:
        found = [columns[main].get(block) for block in blocks]
        lines += areas(xs, [(up(min(v)), up(max(v))) if v else None for v in found], "area", lone)
    for name in sorted(columns, key=lambda name: name == main):
        found = [columns[name].get(block) for block in blocks]
        medians = [up(statistics.median(v)) if v else None for v in found]
        lines += polylines(xs, medians, f"curve {tones[name]}", lone)
    return lines


def _by_block(layers: list[Record], key: str, is_share: bool) -> dict[int, list[float]]:
    """Block -> the values that the axis can show."""
    of_block: dict[int, list[float]] = {}
    for layer in layers:
        value = layer.get(key)
        if units.is_drawable(value) and (value > 0 or is_share):
            of_block.setdefault(layer["block"], []).append(value)
    return of_block


def _tones(names: list[str], main: str | None) -> dict[str, str]:
    others = [name for name in names if name != main]
    tones = {name: f"t{1 + i % _NUM_TONES}" for i, name in enumerate(others)}
    return {name: tones.get(name, "t0") for name in names}


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
