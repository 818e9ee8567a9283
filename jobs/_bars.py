"""The bar charts of the report page as plain values; the template turns them into HTML.

Owns what is compared with what: perplexity against the dense model, sizes against the dense file,
stages against the longest. Lengths and places are shares of the track, from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jobs import _format
from jobs._svg import Scale, tick_label


@dataclass(frozen=True)
class Span:
    """One coloured stretch of a track. tone: loss, baseline, gain, disk, packed, time, reused."""

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
