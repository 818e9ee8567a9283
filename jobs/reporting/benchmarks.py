"""Scores on benchmark tasks on the report's page: columns, rows and a chart, as plain values."""

from __future__ import annotations

from typing import Any

from jobs.harness.words import (
    NOTE,
    labels,
    manner,
    metric_of,
    name_of,
    partial,
    recovery_of,
    score_of,
)
from jobs.reporting import units
from jobs.reporting.bars import Bar, BarChart, Span
from jobs.reporting.svg import Scale


def page_rows(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Columns, rows, chart and words of the page's section; None where no task was asked."""
    tasks = summary.get("tasks")
    if not tasks:
        return None
    names = labels(summary)
    columns = [("Metric", "")]
    for model, label in names.items():
        columns.append((label, ""))
        if model != "dense" and "dense" in names:
            columns.append(("of dense", "%"))
    rows = []
    for row in tasks["rows"]:
        cells = [metric_of(row)]
        for entry in row["scores"]:
            cells.append(score_of(entry))
            if entry["model"] != "dense" and "dense" in names:
                cells.append(recovery_of(entry))
        rows.append((name_of(row), cells, "main" if row["is_mean"] else ""))
    return {
        "columns": columns, "rows": rows, "chart": recovery_chart(summary),
        "charted": list(names.values())[-1],
        "note": NOTE if "dense" in names and len(names) > 1 else "",
        "partial": partial(tasks), "manner": manner(tasks),
    }  # fmt: skip


def recovery_chart(summary: dict[str, Any]) -> BarChart | None:
    """The last model's recovery of each task: its interval and, as a dot, itself."""
    tasks, names = summary["tasks"], labels(summary)
    model = list(names)[-1]
    found = []
    for row in tasks["rows"]:
        entry = next(one for one in row["scores"] if one["model"] == model)
        if units.is_drawable(entry["recovery"]):
            found.append((row, entry))
    if not found:
        return None
    keys = ("recovery", "recovery_low", "recovery_high")
    every = [100.0] + [100 * e[key] for _, e in found for key in keys if units.is_drawable(e[key])]
    scale = Scale.over(every, False, pad=0.04)
    bars = []
    for row, entry in found:
        spans = []
        if units.is_drawable(entry["recovery_low"]):
            low, high = scale(100 * entry["recovery_low"]), scale(100 * entry["recovery_high"])
            tone = "baseline" if entry["is_noise"] else "gain" if entry["recovery"] > 1 else "loss"
            spans.append(Span(tone, low, high - low))
        name, dot = name_of(row), scale(100 * entry["recovery"])
        title = f"{name}: {recovery_of(entry)} % of dense"
        value = f"{recovery_of(entry, False)} %"
        bars.append(Bar(name, value, "", title, [spans], dot, bool(row["is_mean"])))
    return BarChart(bars, scale.labels(5), (scale(100.0), "dense"))
