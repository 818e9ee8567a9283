"""The bars of a comparison of runs as plain values: one row for each run, whatever became of it."""

from __future__ import annotations

from typing import Any

from jobs.reporting import units
from jobs.reporting.bars import Bar, BarChart, Span
from jobs.reporting.comparison import final_perplexity, label_of
from jobs.reporting.results import is_plottable
from jobs.reporting.svg import Scale


def perplexity_chart(comparison: dict[str, Any]) -> BarChart | None:
    """From dense to one-shot, with what recovery won back of it; None where nothing was scored."""
    runs = comparison["runs"]
    names = ("dense", "one_shot", "recovered")
    known = [run[name] for run in runs for name in names if is_plottable({"perplexity": run[name]})]
    if not any(final_perplexity(run) for run in runs):
        return None
    scale = Scale.over(known, is_log=True, pad=0.04)
    rows = []
    for run in runs:
        label, final = label_of(comparison, run), final_perplexity(run)
        places = {
            name: scale(run[name]) for name in names if is_plottable({"perplexity": run[name]})
        }
        spans = _spans(places)
        share = run["log_gap_recovered"]
        note = f"{units.percent(share, 0)} won back" if share is not None else ""
        if final is None:
            note = run["state"]
        title = f"{run['run']}: {run['state']}, perplexity {units.perplexity(final)}"
        dot = scale(final) if final is not None and not spans else None
        is_best = run["run"] == comparison["best"]
        rows.append(Bar(label, units.perplexity(final), note, title, [spans], dot, is_best))
    dense = {run["dense"] for run in runs if run["dense"] is not None}
    is_one = len(dense) == 1 and is_plottable({"perplexity": next(iter(dense))})
    return BarChart(rows, scale.labels(5), (scale(dense.pop()), "dense") if is_one else None)


def _spans(places: dict[str, float]) -> list[Span]:
    dense = places.get("dense")
    last = places.get("recovered", places.get("one_shot"))
    if dense is None or last is None:
        return []
    if last < dense:
        return [Span("gain", last, dense - last)]
    spans = [Span("loss", dense, last - dense)]
    one_shot = places.get("one_shot")
    if "recovered" in places and one_shot is not None and last < one_shot:
        spans.append(Span("regained", last, one_shot - last))
    return spans


def error_chart(comparison: dict[str, Any]) -> BarChart | None:
    """Each run's median error of a layer; None where fewer than two are known."""
    return _lengths(comparison, "median_error", units.significant)


def time_chart(comparison: dict[str, Any]) -> BarChart | None:
    """Each run's time; None where fewer than two are known."""
    return _lengths(comparison, "duration_s", units.duration)


def _lengths(comparison: dict[str, Any], name: str, spell: Any) -> BarChart | None:
    runs = comparison["runs"]
    known = [run[name] for run in runs if units.is_drawable(run[name])]
    if len(known) < 2 or max(known) <= 0:
        return None
    rows = []
    for run in runs:
        label, value = label_of(comparison, run), run[name]
        note = run["state"] if value is None else ""
        title = f"{run['run']}: {spell(value)}"
        is_best = run["run"] == comparison["best"]
        spans = []
        if units.is_drawable(value):
            spans = [Span("time", 0.0, max(0.0, value / max(known)))]
        rows.append(Bar(label, spell(value), note, title, [spans], None, is_best))
    return BarChart(rows)
