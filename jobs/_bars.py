"""The bar charts of the report page as plain values; the template turns them into HTML.

Owns what is compared with what: perplexity against the dense model, sizes against the dense file,
stages against the longest. Lengths and places are shares of the track, from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jobs import _format
from jobs._layers import FEW_TOKENS, PHASES, Record, drawable, shared_inputs
from jobs._svg import Scale, tick_label


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
