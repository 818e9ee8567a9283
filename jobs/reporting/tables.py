"""The tables a run ends with in the terminal; readable at 80 columns, and at 60.

Text of the run goes in as `rich.text.Text`, so that square brackets in a name stay what they are.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.harness import words
from jobs.reporting import units
from jobs.reporting.comparison import columns_of, short_keys
from jobs.reporting.comparison import label_of as label_in
from jobs.reporting.deployed import conditions, generation_rows, layer_rows
from jobs.reporting.layers import Record, by_method, drawable, linear_kind, main_method, short_kinds
from jobs.reporting.results import is_recovered, label_of
from sparsify.pattern import DENSE

_RESULT_COLUMNS = (
    ("Perplexity", "perplexity", units.perplexity),
    ("Gap\nrecovered", "log_gap_recovered", units.percent),
    ("KL\n(nats)", "kl", units.significant),
    ("Size\non disk", "disk_bytes", units.size),
    ("Packed\nsize", "packed_bytes", units.size),
)

NARROWEST = 60
"""columns of a terminal that every table has room in"""

_MOST_KEYS = 3  # options that differ between runs that get a column each

_LEFT_OUT = ("kl", "disk_bytes")  # where there is no room for them beside a model's name


def print_tables(make: Callable[[int], list[Table]]) -> None:
    """Print what `make` gives for the terminal's width in columns."""
    console = Console()
    # Below the width that they are made for, lines that the terminal wraps say more than cut ones.
    console.width = max(console.width, NARROWEST)
    for table in make(console.width):
        console.print(table)


def summary_tables(summary: dict[str, Any], width: int) -> list[Table]:
    """The tables of a run."""
    return [
        *([results_table(summary, width)] if summary["results"] else []),
        *([tasks_table(summary)] if summary.get("tasks") else []),
        *([pruning_table(summary)] if summary["layers"] else []),
        *([speed_table(summary["speed"])] if summary.get("speed") else []),
        stages_table(summary),
    ]


def runs_table(comparison: dict[str, Any], width: int = 80) -> Table:
    """One row per run of a sweep: what differs, where it is, what it has measured.

    Args:
        comparison: of `comparison.compare_folder`.
        width: of the terminal, in columns; below 100 error by layer and speed are left out where
            there is a perplexity. Both are in compare.json and on the page.
    """
    columns, dense = columns_of(comparison, width < 100)
    names = short_keys(comparison)
    if not 1 <= len(names) <= _MOST_KEYS:
        names = {}
    table = new_table(*(list(names.values()) or ["Run"]), "State", *(name for name, _ in columns))
    for column in table.columns[: len(names)]:  # words, which may be long
        column.justify, column.overflow, column.no_wrap = "left", "fold", False
        column.min_width = 4
    if dense is not None:
        table.caption = f"dense: perplexity {units.perplexity(dense)}"
        table.caption_justify = "left"
    for at, run in enumerate(comparison["runs"]):
        words = run["words"] or {}
        what = [str(words.get(key, units.MISSING)) for key in names] if words else []
        if not what:
            what = [label_in(comparison, run), *[""] * (len(names) - 1)]
        is_bad = run["state"] in ("failed", "unknown")
        table.add_row(
            *(Text(text) for text in what),
            Text(run["state"], style="bold red" if is_bad else ""),
            *(cells[at] for _, cells in columns),
            style="bold" if run["run"] == comparison["best"] else "",
        )
    return table


def new_table(*headings: str) -> Table:
    """A table whose first column gives way, and whose numbers are never cut or wrapped."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    first, *numbers = headings
    table.add_column(Text(first), overflow="fold", min_width=8, vertical="bottom")
    for heading in numbers:
        table.add_column(Text(heading), justify="right", no_wrap=True, vertical="bottom")
    return table


def results_table(summary: dict[str, Any], width: int = 80) -> Table:
    """One row per evaluated model: quality, share of the gap recovered, sizes, violations.

    Args:
        summary: schema 1; a missing or empty `results` gives a table without rows.
        width: of the terminal, in columns. Below 76 the KL divergence and the size on disk are left
            out, so that names keep their room; both are in summary.json and on the page.
    """
    pattern = str((summary.get("run") or {}).get("pattern") or "pattern")
    heading = pattern if len(pattern) <= 10 else "sparsity"  # 'unstructured:0.5' is too wide
    if pattern == DENSE:
        heading = "pattern"
    columns = [c for c in _RESULT_COLUMNS if width >= 76 or c[1] not in _LEFT_OUT]
    table = new_table("Model", *(name for name, _, _ in columns), f"{heading}\nviolations")
    for row in summary.get("results") or []:
        violations = row.get("violations")
        table.add_row(
            Text(label_of(row)),
            *(spell(row.get(key)) for _, key, spell in columns),
            Text(units.count(violations), style="bold red" if violations else ""),
            style="bold" if is_recovered(row["name"]) else "",
        )
    return table


def tasks_table(summary: dict[str, Any]) -> Table:
    """Benchmark tasks: a row for each task and model, and the means."""
    tasks, names = summary["tasks"], words.labels(summary)
    is_compared = "dense" in names and len(names) > 1
    table = new_table("Task", *(["% of dense", "Score"] if is_compared else ["Score"]))
    for row in tasks["rows"]:
        metric = words.metric_of(row)
        title = words.name_of(row) + (f", {metric}" if metric else "")
        style = "bold" if row["is_mean"] else ""
        table.add_row(Text(title), style=style)
        for entry in row["scores"]:
            cells = [words.recovery_of(entry)] if is_compared else []
            table.add_row(
                Text(f"  {names[entry['model']]}"), *cells, words.score_of(entry), style=style
            )
    said = [words.partial(tasks), words.NOTE if is_compared else ""]
    table.caption = Text(" ".join(text for text in said if text))
    table.caption_justify = "left"
    return table


def pruning_table(summary: dict[str, Any]) -> Table:
    """One row per method: its time, its layers' relative error, and the large weights it kept.

    Args:
        summary: schema 1; a missing or empty `layers` gives a table without rows. A column that
            no method has a value for, such as the times in old summaries, is left out.
    """
    run = summary.get("run") or {}
    groups = by_method(summary.get("layers") or [])
    times = {str(row["method"]): row.get("duration_s") for row in summary.get("pruning") or []}
    rows = []
    for method, layers in groups.items():
        errors, kept = drawable(layers, "relative_error"), drawable(layers, "large_kept")
        rows.append(
            (
                method,
                units.duration(times.get(method)),
                units.significant(statistics.median(errors) if errors else None),
                units.significant(max(errors, default=None)),
                _worst_place(layers),
                units.percent(statistics.fmean(kept) if kept else None),
            )
        )
    headings = (
        "One-shot", "Time", "Median\nerror", "Largest\nerror", "in\nblock", "Large\nweights\nkept",
    )  # fmt: skip
    used = [
        i for i in range(len(headings)) if i == 0 or any(row[i] != units.MISSING for row in rows)
    ]
    table = new_table(*(headings[i] for i in used))
    main = main_method(run, groups)
    for row in rows:
        cells = [Text(row[i]) for i in used]
        table.add_row(*cells, style="bold" if row[0] == main and len(rows) > 1 else "")
    return table


def _worst_place(layers: list[Record]) -> str:
    """Block and kind of the layer with the largest error: '3 v_proj'."""
    short = short_kinds(layers)
    known = [layer for layer in layers if units.is_drawable(layer.get("relative_error"))]
    if not known:
        return units.MISSING
    worst = max(known, key=lambda layer: layer["relative_error"])
    kind = linear_kind(worst["name"], worst["block"])
    return f"{worst['block']} {short[kind]}"


def speed_table(speed: dict[str, Any]) -> Table:
    """One row per exported model that was timed, and one per side of the large layer."""
    table = new_table("Answering", "Weights", "First\ntoken", "Tokens/s", "Times\ndense")
    table.caption = f"batch 1, {conditions(speed)}"
    table.caption_justify = "left"
    for row in generation_rows(speed):
        table.add_row(
            Text(row["name"]), units.size(row["num_bytes"]),
            units.milliseconds(row["first_token_s"]), units.significant(row["tokens_per_s"]),
            units.ratio(row["times_dense"]),
        )  # fmt: skip
    if layer := speed.get("layer"):
        table.add_section()
        table.add_row(Text(f"one layer, {layer['rows']} × {layer['columns']}", style="dim"))
        for row in layer_rows(layer):
            table.add_row(
                Text(row["name"]), units.size(row["num_bytes"]),
                units.milliseconds(row["median_s"]), "", units.ratio(row["times_dense"]),
            )  # fmt: skip
    return table


def stages_table(summary: dict[str, Any]) -> Table:
    """One row per stage: ran or reused, its time, and its share of the time that was spent now."""
    stages = summary.get("stages") or []
    spent = [
        stage["duration_s"]
        for stage in stages
        if stage.get("status") == "ran" and units.is_finite(stage.get("duration_s"))
    ]
    total = sum(spent)
    table = new_table("Stage", "Status", "Time", "Share")
    for stage in stages:
        seconds, ran = stage.get("duration_s"), stage.get("status") == "ran"
        known = ran and total > 0 and units.is_finite(seconds)
        table.add_row(
            Text(str(stage["name"])),
            Text(str(stage.get("status") or units.MISSING)),
            units.duration(seconds),
            units.percent(seconds / total if known else None, 0),
            style="" if ran else "dim",
        )
    if len(spent) > 1:
        table.add_section()
        table.add_row("all", "", units.duration(total), "")
    return table
