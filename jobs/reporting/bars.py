"""The bar charts of the report page as plain values; the template turns them into HTML.

Owns what is compared with what: perplexity against the dense model, sizes against the dense file,
stages against the longest. Lengths and places are shares of the track, from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jobs.reporting import units
from jobs.reporting.layers import Record, drawable, shared_inputs
from jobs.reporting.results import (
    Row,
    find_result,
    is_plottable,
    is_recovered,
    label_of,
    times_dense,
)
from jobs.reporting.svg import Scale
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


def perplexity_chart(results: list[Row], method: str | None) -> BarChart | None:
    """Bars from the dense model's perplexity to each result's, on a logarithmic axis.

    A logarithmic axis has no zero to start from, so a bar starts at dense and its length is the
    log-perplexity gap, the same quantity `log_gap_recovered` is a share of. Without a dense result
    there are only dots. Results that are not finite keep their row, without a mark.
    """
    finite = [row["perplexity"] for row in results if is_plottable(row)]
    if not finite:
        return None
    scale = Scale.over(finite, is_log=True, pad=0.04)

    def place_of(row: Row | None) -> float | None:
        return scale(row["perplexity"]) if row is not None and is_plottable(row) else None

    dense = find_result(results, "dense")
    origin, top = place_of(dense), place_of(find_result(results, method))
    rows = []
    for row in results:
        label, value, place = label_of(row), units.perplexity(row.get("perplexity")), place_of(row)
        times = times_dense(row, dense)
        spans, note = [], ""
        if times is not None and place is not None and origin is not None:
            spans = _perplexity_spans(place, origin, top, row, method)
            note = f"{units.ratio(times)} dense"
        title = f"{label}: perplexity {value}" + (note and f", {note}")
        is_main = is_recovered(row["name"]) or row["name"] == method
        rows.append(Bar(label, value, note, title, [spans], None if spans else place, is_main))
    return BarChart(rows, scale.labels(5), (origin, "dense") if origin is not None else None)


def _perplexity_spans(
    place: float, dense: float, one_shot: float | None, row: Row, method: str | None
) -> list[Span]:
    """Orange for what is lost against dense; blue for what recovery won back of it."""
    if place < dense:
        return [Span("gain", place, dense - place)]
    recovered = is_recovered(row["name"])
    tone = "loss" if recovered or row["name"] == method else "baseline"
    spans = [Span(tone, dense, place - dense)]
    if recovered and one_shot is not None and place < one_shot:
        share = row.get("log_gap_recovered")
        text = f"{units.percent(share, 0)} won back" if units.is_finite(share) else ""
        spans.append(Span("regained", place, one_shot - place, text))
    return spans


def size_chart(results: list[Row]) -> BarChart | None:
    """Size of the checkpoint folder and of the packed file; results of equal sizes share a row."""
    groups: dict[tuple[float | None, float | None], list[Row]] = {}
    for row in results:
        sizes = row.get("disk_bytes"), row.get("packed_bytes")
        if any(units.is_drawable(size) for size in sizes):
            groups.setdefault(sizes, []).append(row)
    if not groups:
        return None
    dense_bytes = (find_result(results, "dense") or {}).get("disk_bytes")
    largest = max([1.0, *(size for pair in groups for size in pair if units.is_drawable(size))])
    rows = []
    for (disk, packed), members in groups.items():
        label = label_of(members[0])
        if len(members) > 1:
            label = ", ".join(str(row["name"]) for row in members)
        tracks = [
            [Span(tone, 0.0, max(0.0, num_bytes / largest))]
            for tone, num_bytes in (("disk", disk if disk != packed else None), ("packed", packed))
            if units.is_drawable(num_bytes)
        ]
        title = f"{label}: {units.size(disk)} on disk"
        note = ""
        if packed:
            title += f", {units.size(packed)} packed"
            note = f"{units.ratio(dense_bytes / packed)} smaller" if dense_bytes else ""
        value = units.size(packed if packed else disk)
        rows.append(Bar(label, value, note, title, tracks, None, bool(packed)))
    return BarChart(rows)


def stage_chart(stages: list[dict[str, Any]]) -> BarChart | None:
    """Wall-clock time of each stage; a reused stage is pale, its time is that of the first run."""
    if not stages:
        return None
    known = [s["duration_s"] for s in stages if units.is_drawable(s.get("duration_s"))]
    longest = max([*known, 1e-9])
    rows = []
    for stage in stages:
        seconds, reused = stage.get("duration_s"), stage.get("status") == "reused"
        text = units.duration(seconds)
        share = max(0.0, seconds / longest) if units.is_drawable(seconds) else 0.0
        title = f"{stage['name']}: {text}" + (" (reused from an earlier run)" if reused else "")
        span = Span("reused" if reused else "time", 0.0, share)
        note = "reused" if reused else ""
        rows.append(Bar(stage["name"], text, note, title, [[span]], None, not reused))
    return BarChart(rows)


def phase_chart(
    phases: dict[str, dict[str, float]], results: list[Row], method: str | None
) -> BarChart | None:
    """Where each method's time went: its phases end to end, against the slowest method."""
    if not phases:
        return None
    order = {phase: i for i, phase in enumerate(PHASES)}
    longest = max(sum(seconds.values()) for seconds in phases.values())
    rows = []
    for name, seconds in phases.items():
        total = sum(seconds.values())
        spans: list[Span] = []
        start = 0.0
        title = f"{name}: {units.duration(total)}"
        for phase in sorted(seconds, key=lambda phase: order.get(phase, len(order))):
            length = seconds[phase] / longest
            if length > 0:
                spans.append(Span(f"phase-{phase if phase in order else 'other'}", start, length))
            start += length
            share = f"{seconds[phase] / total:.0%}"
            title += f"\n{phase} {units.duration(seconds[phase])} ({share})"
        result = find_result(results, name)
        note = f"perplexity {units.perplexity(result.get('perplexity'))}" if result else ""
        rows.append(Bar(name, units.duration(total), note, title, [spans], None, name == method))
    return BarChart(rows)


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
    rows = []
    for name, (members, values) in groups.items():
        least, most = min(values), max(values)
        value = units.significant(least)
        shape = members[0].get("shape") or []
        note = f"{units.count(shape[1])} columns" if len(shape) == 2 else ""
        title = f"{name}: {value} tokens per column" + (note and f", {note}")
        spans = [Span("few", 0.0, scale(FEW_TOKENS))]
        if most > least:
            spans.append(Span("time", scale(least), scale(most) - scale(least)))
            title += f", up to {units.significant(most)}"
        rows.append(Bar(name, value, note, title, [spans], scale(least), least < FEW_TOKENS))
    return BarChart(rows, scale.labels())
