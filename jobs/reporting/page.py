"""The report of a run as one HTML page that needs nothing but itself.

Decides what the page says (the headline, the sentences, which sections there are); the drawings
come from `bars`, `curves` and `layer_charts`, the markup and the style from `page.html.j2`. The
page holds no script and asks the network for nothing, and says so to the browser in its content
policy. Equal summaries give equal pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2

from jobs.reporting import units
from jobs.reporting.bars import perplexity_chart, size_chart, stage_chart
from jobs.reporting.benchmarks import page_rows
from jobs.reporting.comparison import columns_of, counted_states
from jobs.reporting.comparison import label_of as label_in
from jobs.reporting.comparison_charts import error_chart, time_chart
from jobs.reporting.comparison_charts import perplexity_chart as perplexity_chart_of_runs
from jobs.reporting.curves import curve_note, forecast_panel, recovery_panels
from jobs.reporting.deployed import speed_of, writing_of
from jobs.reporting.dropping import drop_section
from jobs.reporting.pruning import pruning_sections
from jobs.reporting.results import find_result, is_recovered, label_of, times_dense
from jobs.reporting.svg import pct
from jobs.reporting.wording import Words, alerts, comparison_headline, headline, lead
from jobs.training.ledger import goodput_rows
from sparsify.errors import InputError

SCHEMA = 1

_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render_report(summary: dict[str, Any]) -> str:
    """The whole page for a run's `summary.json`.

    Args:
        summary: schema 1. Every section but `schema` may be missing or null; what is missing has no
            section on the page and is named at its end.

    Returns:
        A complete HTML document. Text from the summary is escaped; characters that no HTML file may
        hold are shown as U+FFFD.

    Raises:
        InputError: the summary has another schema than this version writes.
    """
    if summary.get("schema") != SCHEMA:
        raise InputError(
            f"summary.json: schema {summary.get('schema')!r} cannot be shown, this version reads "
            f"schema {SCHEMA}; make the report with the version that made the run, or run again"
        )
    run = summary.get("run") or {}
    results = summary.get("results") or []
    layers = summary.get("layers") or []
    recovery = summary.get("recovery") or {}
    quantization = summary.get("quantization") or {}
    words = headline(summary)
    columns, rows = _results_table(results, str(run.get("pattern") or "pattern"))
    return _rendered(
        "page.html.j2",
        words,
        lead=lead(run, results, recovery),
        has_comparison=any(
            row.get(key) is not None for row in results for key in ("kl", "top1_agreement")
        ),
        has_shares=any(row.get("log_gap_recovered") is not None for row in results),
        byline=_byline(run),
        alerts=alerts(run, results, layers, recovery)
        + [str(w) for w in summary.get("warnings") or []],
        perplexities=perplexity_chart(results, run.get("method")),
        columns=columns,
        results=rows,
        tasks=page_rows(summary),
        recovery_note=_recovery_note(recovery),
        panels=recovery_panels(recovery),
        curve_note=curve_note(recovery),
        forecast=forecast_panel(recovery),
        goodput=_goodput(recovery.get("goodput") or {}),
        dropping=drop_section(summary.get("dropping")),
        pruning=pruning_sections(summary),
        sizes=size_chart(results),
        writing=writing_of(summary),
        speed=speed_of(summary),
        stages=stage_chart(summary.get("stages") or []),
        facts=_facts(run, quantization),
        versions=sorted((run.get("versions") or {}).items()),
        command=run.get("command"),
        absent=_absent(results, layers, recovery, quantization),
    )


def render_comparison(comparison: dict[str, Any]) -> str:
    """The whole page for the runs of a sweep; see `comparison.compare_folder`."""
    runs, best = comparison["runs"], comparison["best"]
    columns, dense = columns_of(comparison)
    columns = [("State", [run["state"] for run in runs]), *columns]
    rows = [
        (
            label_in(comparison, run),
            [cells[at] for _, cells in columns],
            "main" if run["run"] == best else "broken" if run["state"] == "failed" else "",
        )
        for at, run in enumerate(runs)
    ]
    facts = [("Folder", comparison["folder"])]
    if dense is not None:
        facts.append(("Dense model", f"perplexity {units.perplexity(dense)}"))
    facts += [(key, value) for key, value in comparison["same"].items()]
    return _rendered(
        "comparison.html.j2",
        comparison_headline(comparison),
        lead=f"Dense model: perplexity {units.perplexity(dense)}." if dense is not None else "",
        byline=[comparison["name"], f"{len(runs)} runs", counted_states(comparison)],
        alerts=[
            f"{label_in(comparison, run)}: {run['state']}{' – ' * bool(run['detail'])}"
            f"{run['detail']}"
            for run in runs
            if run["state"] != "done"
        ],
        perplexities=perplexity_chart_of_runs(comparison),
        errors=error_chart(comparison),
        columns=[(name.replace("\n", " "), "") for name, _ in columns],
        rows=rows,
        times=time_chart(comparison),
        facts=facts,
        command=comparison["command"],
    )


def render_curation(values: dict[str, Any], command: str) -> str:
    """The whole page of a curated corpus; `values` of `curation.page_values`."""
    words = values.pop("words")
    return _rendered("curation.html.j2", words, command=command, **values)


def _rendered(template: str, words: Words, **values: Any) -> str:
    """A page by its template; `words` are its title and headline."""
    folder = resources.files("jobs.reporting")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
    )  # fmt: skip
    environment.filters["pct"] = pct
    page = environment.get_template(template).render(
        title="".join(text for text, _ in words),
        words=[(text.replace(" %", "\u00a0%"), tone) for text, tone in words],
        **values,
    )
    return _UNWRITABLE.sub("\ufffd", page)


def _byline(run: dict[str, Any]) -> list[str]:
    """Model, workers and time, as far as they are known."""
    parts = [str(run["name"])] if run.get("name") else []
    if run.get("num_parameters") is not None:
        parts.append(f"{units.large_count(run['num_parameters'])} parameters")
    if run.get("num_workers") is not None:
        plural = "worker" if run["num_workers"] == 1 else "workers"
        device = f" on {run['device']}" if run.get("device") else ""
        parts.append(f"{units.count(run['num_workers'])} {plural}{device}")
    if run.get("duration_s") is not None:
        parts.append(units.duration(run["duration_s"]))
    return parts


def _results_table(
    results: list[dict[str, Any]], pattern: str
) -> tuple[list[tuple[str, str]], list[tuple[str, list[str], str]]]:
    """(heading, unit) of the columns that hold anything, and (label, cells, CSS class) of rows."""
    dense = find_result(results, "dense")

    def column(key: str, spell: Callable[[float | None], str]) -> list[str]:
        return [spell(row.get(key)) for row in results]

    columns = [
        ("Perplexity", "", column("perplexity", units.perplexity)),
        ("Against dense", "", [units.ratio(times_dense(row, dense)) for row in results]),
        ("Gap recovered", "", column("log_gap_recovered", units.percent)),
        ("KL", "nats/token", column("kl", units.significant)),
        ("Top-1 agreement", "", column("top1_agreement", units.percent)),
        ("Size on disk", "", column("disk_bytes", units.size)),
        ("Packed size", "", column("packed_bytes", units.size)),
        ("Zeros", "of all weights", column("zero_share", units.percent)),
        (f"{pattern} violations", "", column("violations", units.count)),
    ]
    columns = [c for c in columns if set(c[2]) != {units.MISSING}]
    rows = [
        (
            label_of(row),
            [cells[i] for _, _, cells in columns],
            ("main " * is_recovered(row["name"]) + "broken" * bool(row.get("violations"))).strip(),
        )
        for i, row in enumerate(results)
    ]
    return [(name, unit) for name, unit, _ in columns], rows


def _recovery_note(recovery: dict[str, Any]) -> str:
    parts = []
    if recovery.get("num_tokens") is not None:
        parts.append(f"{units.count(recovery['num_tokens'])} tokens")
    if recovery.get("tokens_per_s") is not None:
        parts.append(f"{units.count(recovery['tokens_per_s'])} tokens/s")
    return ", ".join(parts)


def _goodput(figures: dict[str, Any]) -> dict[str, Any] | None:
    """Where the training's time went, as a sentence and rows; None without a ledger."""
    if not figures:
        return None
    parts = [
        f"{units.percent(figures['goodput'])} of {units.duration(figures['wall_s'])} went into "
        f"{units.count(figures['num_steps'])} steps that count"
    ]
    if figures["num_lost_steps"]:
        parts.append(f"{units.count(figures['num_lost_steps'])} steps were done again")
    if figures["num_starts"] > 1:
        parts.append(f"{units.count(figures['num_starts'])} starts")
    rows = [
        (words, [units.duration(seconds), units.percent(share)], "")
        for words, seconds, share in goodput_rows(figures)
    ]
    return {"summary": "; ".join(parts), "rows": rows}


def _facts(run: dict[str, Any], quantization: dict[str, Any]) -> list[tuple[str, str]]:
    """What was run, on what: (name, value) of everything that is known."""
    facts = [
        (name, str(run[key]))
        for name, key in (
            ("Model", "model"), ("Pattern", "pattern"), ("Method", "method"), ("Seed", "seed"),
            ("Cluster", "cluster"), ("Device", "device"), ("Folder", "dir"),
        )
        if run.get(key) is not None
    ]  # fmt: skip
    if run.get("num_parameters") is not None:
        facts.insert(1, ("Parameters", units.count(run["num_parameters"])))
    if run.get("num_workers") is not None:
        facts.append(("Workers", units.count(run["num_workers"])))
    if quantization.get("scheme") is not None:
        method = str(quantization.get("method") or "").upper()
        text = f"{method} {quantization['scheme'].upper()}"
        if (size := quantization.get("group_size")) is not None:
            text += ", one scale a channel" if size < 0 else f", groups of {size}"
        facts.append(("Quantization", text.strip()))
    if run.get("duration_s") is not None:
        facts.append(("Duration", units.duration(run["duration_s"])))
    return facts


def _absent(
    results: list[dict[str, Any]],
    layers: list[dict[str, Any]],
    recovery: dict[str, Any],
    quantization: dict[str, Any],
) -> str:
    """The stages this run has no numbers of, as a phrase."""
    missing = [
        name
        for name, there in (
            ("pruning", layers),
            ("recovery training", recovery),
            ("evaluation", results),
            ("quantization", quantization),
            ("packed files", any(row.get("packed_bytes") for row in results)),
        )
        if not there
    ]
    return ", ".join(missing)
