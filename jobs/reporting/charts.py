"""The bar charts of the report page as plain values; the template turns them into HTML.

Owns what is compared with what: perplexity against the dense model, sizes against the dense file,
stages against the longest. Lengths and places are shares of the track, from 0 to 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from jobs.reporting import units as _format
from jobs.reporting.layers import Record, drawable, linear_kind, shared_inputs, short_kinds
from sparsify.pruning.progress import FEW_TOKENS, PHASES


@dataclass(frozen=True)
class Span:
    """One coloured stretch of a track.

    tone: loss, baseline, gain, regained, disk, packed, time, reused, few, or phase-<name>.
    """

    tone: str
    start: float
    length: float
    text: str = ""


@dataclass(frozen=True)
class Bar:
    """One row: what it is, its tracks (one or two), its value and a remark, and the hover text."""

    label: str
    value: str
    note: str
    title: str
    tracks: list[list[Span]]
    dot: float | None = None
    is_main: bool = False


@dataclass(frozen=True)
class BarChart:
    """Rows over one axis; `ticks` and the `reference` line through all rows are (place, label)."""

    rows: list[Bar]
    ticks: list[tuple[float, str]] = field(default_factory=list)
    reference: tuple[float, str] | None = None

    @property
    def tones(self) -> set[str]:
        """The colours in use: what a key has to explain."""
        return {span.tone for bar in self.rows for lane in bar.tracks for span in lane}


def is_recovered(name: str) -> bool:
    """Whether a result is of a model that was trained after pruning."""
    return name.startswith("recovered")


def find_result(results: list[dict[str, Any]], name: str | None) -> dict[str, Any] | None:
    """The result called `name`, if it was measured."""
    return next((row for row in results if row.get("name") == name), None)


def is_plottable(row: dict[str, Any] | None) -> bool:
    """Whether a result has a perplexity that a logarithmic axis can show."""
    if row is None:
        return False
    value = row.get("perplexity")
    return _format.is_drawable(value) and value > 0


def _perplexity_spans(
    place: float, dense: float, one_shot: float | None, row: dict[str, Any], method: str | None
) -> list[Span]:
    """Orange for what is lost against dense; blue for what recovery won back of it."""
    if place < dense:
        return [Span("gain", place, dense - place)]
    recovered = is_recovered(row["name"])
    tone = "loss" if recovered or row["name"] == method else "baseline"
    spans = [Span(tone, dense, place - dense)]
    if recovered and one_shot is not None and place < one_shot:
        share = row.get("log_gap_recovered")
        text = f"{_format.percent(share, 0)} won back" if _format.is_finite(share) else ""
        spans.append(Span("regained", place, one_shot - place, text))
    return spans


def perplexity_chart(results: list[dict[str, Any]], method: str | None) -> BarChart | None:
    """Bars from the dense model's perplexity to each result's, on a logarithmic axis.

    A logarithmic axis has no zero to start from, so a bar starts at dense and its length is the
    log-perplexity gap, the same quantity `log_gap_recovered` is a share of. Without a dense result
    there are only dots. Results that are not finite keep their row, without a mark.
    """
    finite = [row["perplexity"] for row in results if is_plottable(row)]
    if not finite:
        return None
    scale = Scale.over(finite, is_log=True, pad=0.04)
    dense, one_shot = find_result(results, "dense"), find_result(results, method)
    origin = scale(dense["perplexity"]) if dense and is_plottable(dense) else None
    top = scale(one_shot["perplexity"]) if one_shot and is_plottable(one_shot) else None
    rows = []
    for row in results:
        label = str(row.get("label") or row["name"])
        place = scale(row["perplexity"]) if is_plottable(row) else None
        spans, note = [], ""
        if place is not None and origin is not None and dense is not None and row is not dense:
            spans = _perplexity_spans(place, origin, top, row, method)
            note = f"{_format.ratio(row['perplexity'] / dense['perplexity'])} dense"
        value = _format.perplexity(row.get("perplexity"))
        rows.append(
            Bar(
                label=label,
                value=value,
                note=note,
                title=f"{label}: perplexity {value}" + (note and f", {note}"),
                tracks=[spans],
                dot=None if spans else place,
                is_main=is_recovered(row["name"]) or row["name"] == method,
            )
        )
    ticks = [(scale(tick), tick_label(tick)) for tick in scale.ticks(5)]
    reference = (origin, "dense") if origin is not None else None
    return BarChart(rows, ticks, reference)


def size_chart(results: list[dict[str, Any]]) -> BarChart | None:
    """Size of the checkpoint folder and of the packed file; results of equal sizes share a row."""
    groups: dict[tuple[float | None, float | None], list[dict[str, Any]]] = {}
    for row in results:
        sizes = row.get("disk_bytes"), row.get("packed_bytes")
        if any(_format.is_drawable(size) for size in sizes):
            groups.setdefault(sizes, []).append(row)
    if not groups:
        return None
    dense = find_result(results, "dense")
    dense_bytes = dense.get("disk_bytes") if dense else None
    largest = max([1.0, *(size for pair in groups for size in pair if _format.is_drawable(size))])
    rows = []
    for (disk, packed), members in groups.items():
        label = str(members[0].get("label") or members[0]["name"])
        if len(members) > 1:
            label = ", ".join(str(row["name"]) for row in members)
        tracks = []
        for tone, num_bytes in (("disk", disk if disk != packed else None), ("packed", packed)):
            if _format.is_drawable(num_bytes):
                tracks.append([Span(tone, 0.0, max(0.0, num_bytes / largest))])
        title = f"{label}: {_format.size(disk)} on disk"
        note = ""
        if packed:
            title += f", {_format.size(packed)} packed"
            note = f"{_format.ratio(dense_bytes / packed)} smaller" if dense_bytes else ""
        value = _format.size(packed if packed else disk)
        rows.append(Bar(label, value, note, title, tracks, None, bool(packed)))
    return BarChart(rows)


def stage_chart(stages: list[dict[str, Any]]) -> BarChart | None:
    """Wall-clock time of each stage; a reused stage is pale, its time is that of the first run."""
    if not stages:
        return None
    known = [s["duration_s"] for s in stages if _format.is_drawable(s.get("duration_s"))]
    longest = max([*known, 1e-9])
    rows = []
    for stage in stages:
        seconds, reused = stage.get("duration_s"), stage.get("status") == "reused"
        text = _format.duration(seconds)
        share = max(0.0, seconds / longest) if _format.is_drawable(seconds) else 0.0
        note = "reused" if reused else ""
        title = f"{stage['name']}: {text}" + (" (reused from an earlier run)" if reused else "")
        span = Span("reused" if reused else "time", 0.0, share)
        rows.append(Bar(stage["name"], text, note, title, [[span]], None, not reused))
    return BarChart(rows)


def phase_chart(
    phases: dict[str, dict[str, float]], results: list[dict[str, Any]], method: str | None
) -> BarChart | None:
    """Where each method's time went: its phases end to end, against the slowest method."""
    if not phases:
        return None
    longest = max(sum(seconds.values()) for seconds in phases.values())
    rows = []
    for name, seconds in phases.items():
        spans: list[Span] = []
        start = 0.0
        for phase in sorted(seconds, key=_phase_order):
            length = seconds[phase] / longest
            if length > 0:
                tone = phase if phase in PHASES else "other"
                spans.append(Span(f"phase-{tone}", start, length))
            start += length
        total = sum(seconds.values())
        result = find_result(results, name)
        note = f"perplexity {_format.perplexity(result.get('perplexity'))}" if result else ""
        parts = [
            f"{phase} {_format.duration(seconds[phase])} ({seconds[phase] / total:.0%})"
            for phase in sorted(seconds, key=_phase_order)
        ]
        title = f"{name}: {_format.duration(total)}\n" + "\n".join(parts)
        rows.append(Bar(name, _format.duration(total), note, title, [spans], None, name == method))
    return BarChart(rows)


def _phase_order(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def token_chart(layers: list[Record]) -> BarChart | None:
    """Calibration tokens per input column of each input, on a logarithmic axis.

    The stretch from too few tokens for their figures to be trusted is marked on every row. An input
    that differs from block to block (experts) has a stretch from its least to its most, and its
    value is the least.

    Args:
        layers: those of one method.
    """
    groups = {
        name: (members, [value for value in drawable(members, "tokens_per_column") if value > 0])
        for name, members in shared_inputs(layers, "tokens_per_column").items()
    }
    groups = {name: group for name, group in groups.items() if group[1]}
    if not groups:
        return None
    every = [value for _, values in groups.values() for value in values]
    scale = Scale.over([*every, FEW_TOKENS, FEW_TOKENS / 4], is_log=True, pad=0.04)
    limit = scale(FEW_TOKENS)
    rows = []
    for name, (members, values) in groups.items():
        least, most = min(values), max(values)
        value = _format.significant(least)
        shape = members[0].get("shape") or []
        note = f"{_format.count(shape[1])} columns" if len(shape) == 2 else ""
        title = f"{name}: {value} tokens per column" + (note and f", {note}")
        spans = [Span("few", 0.0, limit)]
        if most > least:
            spans.append(Span("time", scale(least), scale(most) - scale(least)))
            title += f", up to {_format.significant(most)}"
        rows.append(Bar(name, value, note, title, [spans], scale(least), least < FEW_TOKENS))
    ticks = [(scale(tick), tick_label(tick)) for tick in scale.ticks(6)]
    return BarChart(rows, ticks)


_MOST_POINTS = 400  # of one curve: more cannot be told apart and only make the page heavy

_FEW_POINTS = 20  # of a curve: no running mean is drawn over so few


@dataclass(frozen=True)
class Panel:
    """One curve over the training steps: its caption with the unit, and the drawing."""

    caption: str
    svg: Markup


def thin_steps(steps: list[dict[str, Any]], most: int = _MOST_POINTS) -> list[dict[str, Any]]:
    """At most `most` steps: each the mean of as many consecutive steps as that takes.

    step and num_tokens are those of the last step of each group; a value that is missing or not
    drawable anywhere in a group is left missing there, so that a gap stays a gap.
    """
    size = math.ceil(len(steps) / most)
    if size <= 1:
        return steps
    thinned = []
    for start in range(0, len(steps), size):
        group = steps[start : start + size]
        merged = dict(group[-1])
        for key in merged.keys() - {"step", "num_tokens"}:
            values = [v for step in group if _format.is_drawable(v := step.get(key))]
            merged[key] = statistics.fmean(values) if len(values) == len(group) else None
        thinned.append(merged)
    return thinned


def _smoothed(values: list[float | None], half_window: int) -> list[float | None]:
    """Centred running mean over what is there; a gap stays a gap."""
    result: list[float | None] = []
    for i, value in enumerate(values):
        near = values[max(0, i - half_window) : i + half_window + 1]
        there = [v for v in near if v is not None]
        result.append(None if value is None else statistics.fmean(there))
    return result


def _hover_text(step: dict[str, Any]) -> str:
    parts = [f"step {_format.count(step.get('step'))}"]
    if step.get("num_tokens") is not None:
        parts.append(f"{_format.count(step['num_tokens'])} tokens")
    names = ("loss", "kl", "ce", "square_head", "learning_rate", "grad_norm")
    for name in names:
        if step.get(name) is not None:
            spelled = name.replace("_", " ").replace("kl", "KL").replace("ce", "CE")
            parts.append(f"{spelled} {_format.significant(step[name])}")
    return "\n".join(parts)


def _curve(
    steps: list[dict[str, Any]], key: str, height: int, *, is_log: bool, smooth: bool, last: bool
) -> Markup | None:
    """One panel: grid, curve, the final value at its end, and a hover strip per step."""
    values = [step[key] if _format.is_drawable(step.get(key)) else None for step in steps]
    finite = [value for value in values if value is not None]
    if not finite:
        return None
    numbers = [float(step["step"]) for step in steps]
    across = Scale.over(numbers, is_log=False)
    up = Scale.over(finite if is_log else [0.0, *finite], is_log=is_log, pad=0.06)
    xs = [across(x) for x in numbers]
    marks: list[Markup] = []
    for tick in up.ticks(5 if height > 120 else 3):
        y = height * (1 - up(tick))
        marks.append(element("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        marks.append(element("text", tick_label(tick), class_="end", x="-8", y=y + 4))
    shown = values
    curves: list[Markup] = []
    if smooth and len(values) > _FEW_POINTS:
        shown = _smoothed(values, max(1, len(values) // 40))
        curves = polylines(xs, [None if v is None else up(v) for v in values], "curve raw")
    curves += polylines(xs, [None if v is None else up(v) for v in shown], "curve")
    marks.append(
        element(
            "svg", *curves, width="100%", height=height, viewBox="0 0 1000 1000",
            preserveAspectRatio="none",
        )
    )  # fmt: skip
    marks.append(_end_label([v for v in shown if v is not None][-1], up, height))
    marks.extend(_hover_strips(steps, xs, height))
    if last:
        marks.extend(_step_axis(across, height))
    label = f"{key.replace('_', ' ')} over {len(steps)} points"
    total = height + (40 if last else 6)
    return element("svg", *marks, class_="plot", role="img", aria_label=label, height=total)


def _end_label(value: float, up: Scale, height: int) -> Markup:
    y = min(height - 2.0, max(10.0, height * (1 - up(value)) + 4))
    return element("text", _format.significant(value), class_="value", x="100%", dx="8", y=y)


def _hover_strips(steps: list[dict[str, Any]], xs: list[float], height: int) -> list[Markup]:
    """An invisible strip per step, as wide as the step is far from its neighbours."""
    strips = []
    for i, step in enumerate(steps):
        left = 0.0 if i == 0 else (xs[i - 1] + xs[i]) / 2
        right = 1.0 if i == len(steps) - 1 else (xs[i] + xs[i + 1]) / 2
        title = element("title", _hover_text(step))
        strips.append(
            element("rect", title, class_="hit", x=pct(left), width=pct(right - left),
                    height=height)
        )  # fmt: skip
    return strips


def _step_axis(across: Scale, height: int) -> list[Markup]:
    marks = []
    for tick in across.ticks(5):
        if tick == int(tick):
            label = f"{int(tick):,}"
            marks.append(
                element("text", label, class_="middle", x=pct(across(tick)), y=height + 17)
            )
    marks.append(element("text", "optimizer step", class_="end", x="100%", y=height + 35))
    return marks


def recovery_panels(recovery: dict[str, Any]) -> list[Panel]:
    """Loss, the parts it is made of, learning rate and gradient norm, one above the other."""
    steps = sorted(recovery.get("steps") or [], key=lambda step: float(step["step"]))
    if not steps:
        return []
    thinned = thin_steps(steps)
    wanted: list[tuple[str, str, int, bool, bool]] = []
    parts = [key for key in ("kl", "ce", "square_head") if any(step.get(key) for step in steps)]
    words = {"kl": "KL to the dense model", "ce": "cross-entropy", "square_head": "SquareHead"}
    if len(parts) == 1:
        caption = f"Loss: {words[parts[0]]}, nats per token"
        if parts[0] == "square_head":
            caption = "Loss: SquareHead, no unit"
        wanted.append(("loss", caption, 230, True, True))
    else:
        wanted.append(("loss", "Loss, weighted sum of its parts", 230, True, True))
        for key in parts:
            unit = "no unit" if key == "square_head" else "nats per token"
            wanted.append((key, f"{words[key][0].upper()}{words[key][1:]}, {unit}", 84, True, True))
    wanted.append(("learning_rate", "Learning rate", 56, False, False))
    wanted.append(("grad_norm", "Gradient norm, before clipping", 56, True, True))
    wanted = [item for item in wanted if any(_format.is_drawable(s.get(item[0])) for s in thinned)]
    panels = []
    for i, (key, caption, height, is_log, smooth) in enumerate(wanted):
        positive = all(s[key] > 0 for s in thinned if _format.is_drawable(s.get(key)))
        axis = "log scale" if is_log and positive else "linear scale"
        svg = _curve(thinned, key, height, is_log=is_log, smooth=smooth, last=i == len(wanted) - 1)
        if svg is not None:
            panels.append(Panel(f"{caption} ({axis})", svg))
    return panels


def forecast_panel(recovery: dict[str, Any]) -> Panel | None:
    """The forecast that was made on the way, as a band over the KL that came of it.

    None where the record has no forecast, or one that only says why there is none.
    """
    forecast = recovery.get("forecast") or {}
    steps = sorted(recovery.get("steps") or [], key=lambda step: float(step["step"]))
    band = [p for p in forecast.get("band") or [] if all(_format.is_drawable(v) for v in p)]
    thinned = [s for s in thin_steps(steps) if _format.is_drawable(s.get("kl"))]
    if len(band) < 2 or not thinned:
        return None
    height = 170
    values = [step["kl"] for step in thinned]
    smooth = _smoothed(values, max(1, len(values) // 40)) if len(values) > _FEW_POINTS else values
    drawn = [v for v in smooth if v is not None]
    across = Scale.over([1.0, forecast["num_steps"]], is_log=False)
    up = Scale.over([*drawn, *(v for p in band for v in p[1:])], is_log=True, pad=0.06)
    outline = [(x, low) for x, low, _, _ in band] + [(x, high) for x, _, _, high in band[::-1]]
    corners = " ".join(f"{1000 * across(x):.1f},{1000 * (1 - up(y)):.1f}" for x, y in outline)
    middle = polylines([across(p[0]) for p in band], [up(p[2]) for p in band], "curve t2")
    happened = polylines([across(s["step"]) for s in thinned], [up(v) for v in drawn], "curve")
    marks: list[Markup] = []
    for tick in up.ticks(5):
        y = height * (1 - up(tick))
        marks.append(element("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        marks.append(element("text", tick_label(tick), class_="end", x="-8", y=y + 4))
    area = element("polygon", class_="band", points=corners)
    marks.append(
        element(
            "svg", area, *middle, *happened, width="100%", height=height, viewBox="0 0 1000 1000",
            preserveAspectRatio="none",
        )
    )  # fmt: skip
    marks.append(_end_label(forecast["predicted"], up, height))
    marks.extend(_step_axis(across, height))
    svg = element(
        "svg", *marks, class_="plot", role="img", aria_label="forecast and outcome",
        height=height + 40,
    )  # fmt: skip
    return Panel(_forecast_caption(forecast), svg)


def _forecast_caption(forecast: dict[str, Any]) -> str:
    step, predicted, low, high = (
        _format.count(forecast["last_step"]),
        *(_format.significant(forecast[key]) for key in ("predicted", "low", "high")),
    )
    share = f"{100 * forecast['coverage']:g} %"
    return (
        f"Forecast at step {step}: {predicted} at the end, {share} interval {low} to {high}; "
        "dashed: its middle, shaded: the interval, solid: running mean of what came (log scale)"
    )


def curve_note(recovery: dict[str, Any]) -> str:
    """What the lines of `recovery_panels` are."""
    num_steps = len(recovery.get("steps") or [])
    size = math.ceil(num_steps / _MOST_POINTS)
    point = "each step" if size <= 1 else f"mean of {size} steps"
    if num_steps <= _FEW_POINTS:
        return f"Line: {point}; the number at its end is the last value."
    return f"Thin line: {point}. Thick line: running mean; the number at its end is its last value."


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
