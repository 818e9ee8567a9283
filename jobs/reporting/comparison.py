"""The runs of a folder beside each other: what differs, where each is, what each has measured.

compare.json (schema 1; keys in docs/run-folder.md). A run that failed, or never began, is in it.
"""

from __future__ import annotations

import contextlib
import shlex
import statistics
from pathlib import Path
from typing import Any

from cluster import launch
from cluster.errors import ClusterError
from cluster.kinds import get_kind
from cluster.kinds._base import DONE
from conf.options.run import STAGES
from jobs.cli.sweep import PLAN
from jobs.reporting import units
from jobs.reporting.layers import by_method, drawable, main_method
from jobs.reporting.results import find_result, is_plottable, is_recovered, quantized_as
from jobs.runs.artifact import RECORD
from jobs.runs.folder import read_json
from sparsify.errors import InputError

SCHEMA = 1

NOT_STARTED, UNKNOWN = "not started", "unknown"

FIGURES = (
    "dense", "one_shot", "recovered", "log_gap_recovered", "quantized", "quantized_as",
    "median_error", "violations", "num_tokens", "tokens_per_s", "packed_bytes", "duration_s",
)  # fmt: skip
"""what is known of each run's results, null where it was not measured"""

Run = dict[str, Any]


def compare_folder(folder: Path) -> dict[str, Any]:
    """All runs of a folder as plain values.

    Args:
        folder: of a sweep, or any that holds runs.

    Raises:
        InputError: there is no run in it, or the plan of the sweep is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give that of a sweep, which holds its runs")
    plan: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        plan = read_json(folder / PLAN, "run the sweep's command again")
    planned = {str(run["folder"]): run["words"] for run in plan.get("runs", [])}
    found = [path.name for path in sorted(folder.iterdir()) if _is_run(path)]
    runs = [_run(folder / name, planned.get(name)) for name in dict.fromkeys([*planned, *found])]
    if not runs:
        raise InputError(f"{folder}: holds no runs; give the folder of a sweep")
    keys = dict.fromkeys(key for run in runs for key in run["words"] or {})
    values = {
        key: {run["words"].get(key) for run in runs if run["words"] is not None} for key in keys
    }
    best = best_run(runs)
    return {
        "schema": SCHEMA,
        "name": folder.absolute().name,
        "folder": str(folder.absolute()),
        "command": plan.get("command"),
        "differs": [key for key in keys if len(values[key]) > 1],
        "same": {key: next(iter(values[key])) for key in keys if len(values[key]) == 1},
        "best": None if best is None else best["run"],
        "runs": runs,
    }


def _is_run(path: Path) -> bool:
    """Whether a command has begun to make a run there."""
    if path.name.startswith(".") or not path.is_dir():
        return False
    signs = [launch.RECORD_PATH, "summary.json", *(f"{stage}/{RECORD}" for stage in STAGES)]
    return any((path / sign).exists() for sign in signs)


def _run(folder: Path, words: list[str] | None) -> Run:
    """One run: name, words, state and figures."""
    summary: dict[str, Any] = {}
    detail = ""
    try:
        summary = read_json(folder / "summary.json", "run the same command again")
    except FileNotFoundError:
        pass
    except InputError as error:  # one damaged file hides no other run
        detail = str(error)
    state, said, code, typed = _state(folder, bool(summary))
    if summary and state != DONE and state != UNKNOWN:
        said = ", ".join(filter(None, [said, "figures are of an earlier command"]))
    if words is None:
        words = _words_of(typed or (summary.get("run") or {}).get("command"))
    return {
        "run": folder.name,
        "words": None if words is None else dict(_pair(word) for word in words),
        "state": state,
        "detail": "; ".join(filter(None, [said, detail])),
        "exit_code": code,
        **figures_of(summary),
    }


def _state(folder: Path, is_measured: bool) -> tuple[str, str, int | None, str]:
    """State, detail, exit code and what was typed, by the run's job where there is one."""
    if not (folder / launch.RECORD_PATH).exists():
        if is_measured:
            return DONE, "", None, ""
        return (UNKNOWN, "no job on record", None, "") if _is_run(folder) else (
            NOT_STARTED, "", None, ""
        )  # fmt: skip
    typed = ""
    try:
        job = launch.find_job(folder)
        typed = job.typed
        status = get_kind(job.kind).status(job)
    except (ClusterError, OSError) as error:  # somebody else's, or no scheduler here
        state = DONE if is_measured else UNKNOWN
        return state, " ".join(str(error).split()), None, typed
    return status.state, status.detail, status.exit_code, typed


def _words_of(command: str | None) -> list[str] | None:
    """The words of a command line but for where its run is; None where it is not known."""
    if not command:
        return None
    words = [word for word in shlex.split(command) if not word.startswith("-")]
    return [word for word in words if "=" in word and not word.startswith("run.dir=")]


def _pair(word: str) -> tuple[str, str]:
    key, _, value = word.lstrip("+").partition("=")
    return key, value


def figures_of(summary: dict[str, Any]) -> dict[str, Any]:
    """What a run has measured, by the names of `FIGURES`."""
    run, results = summary.get("run") or {}, summary.get("results") or []
    recovery = summary.get("recovery") or {}
    groups = by_method(summary.get("layers") or [])
    method = run.get("method") or (main_method(run, groups) if groups else None)
    quantized = next((row for row in reversed(results) if quantized_as(row["name"])), None)
    recovered = next(
        (row for row in results if is_recovered(row["name"]) and row is not quantized), None
    )
    errors = drawable(groups.get(method, []), "relative_error") if method else []
    checked = [row["violations"] for row in results if row.get("violations") is not None]
    sizes = [row["packed_bytes"] for row in results if row.get("packed_bytes")]
    found = {
        "dense": (find_result(results, "dense") or {}).get("perplexity"),
        "one_shot": (find_result(results, method) or {}).get("perplexity"),
        "recovered": (recovered or {}).get("perplexity"),
        "log_gap_recovered": (recovered or {}).get("log_gap_recovered"),
        "quantized": (quantized or {}).get("perplexity"),
        "quantized_as": quantized_as(quantized["name"]) if quantized else None,
        "median_error": statistics.median(errors) if errors else None,
        "violations": sum(checked) if checked else None,
        "num_tokens": recovery.get("num_tokens"),
        "tokens_per_s": recovery.get("tokens_per_s"),
        "packed_bytes": min(sizes, default=None),
        "duration_s": run.get("duration_s"),
    }
    return {name: found[name] for name in FIGURES}


def final_perplexity(run: Run) -> float | None:
    """Of the model that the run ends with, before it is quantised; None without a usable one."""
    for name in ("recovered", "one_shot"):
        if run[name] is not None:
            return float(run[name]) if is_plottable({"perplexity": run[name]}) else None
    return None


def best_run(runs: list[Run]) -> Run | None:
    """The one that ends with the lowest perplexity, or without any with the lowest error."""
    for key in (final_perplexity, lambda run: run["median_error"]):
        values = [(key(run), at) for at, run in enumerate(runs)]
        known = [(value, at) for value, at in values if units.is_finite(value)]
        if len(known) > 1:
            return runs[min(known)[1]]
    return None


def short_keys(comparison: dict[str, Any]) -> dict[str, str]:
    """Options that differ between runs -> their names without the group, where that is clear."""
    short = {key: key.rpartition(".")[2] for key in comparison["differs"]}
    names = list(short.values())
    return {key: name if names.count(name) == 1 else key for key, name in short.items()}


def label_of(comparison: dict[str, Any], run: Run) -> str:
    """What differs about a run: `method=wanda seed=0`; its folder's name where that is unknown."""
    words = run["words"] or {}
    names = short_keys(comparison)
    parts = [f"{name}={words[key]}" for key, name in names.items() if key in words]
    return " ".join(parts) or str(run["run"])


def counted_states(comparison: dict[str, Any]) -> str:
    """`3 done, 1 failed`."""
    states = [run["state"] for run in comparison["runs"]]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def columns_of(
    comparison: dict[str, Any], is_narrow: bool = False
) -> tuple[list[tuple[str, list[str]]], float | None]:
    """(heading, a cell for each run) of what any run has measured, and the dense perplexity where
    all that know one know the same; with little room, quality and time before the rest."""
    runs = comparison["runs"]
    dense = {run["dense"] for run in runs if run["dense"] is not None}
    schemes = {run["quantized_as"] for run in runs if run["quantized_as"] is not None}
    headings = (
        ("Dense", "dense", units.perplexity),
        ("One-shot", "one_shot", units.perplexity),
        ("Recovered", "recovered", units.perplexity),
        ("Gap\nrecovered", "log_gap_recovered", units.percent),
        (
            schemes.pop().upper() if len(schemes) == 1 else "Quantised",
            "quantized",
            units.perplexity,
        ),
        ("Median\nerror", "median_error", units.significant),
        ("Tokens/s", "tokens_per_s", units.count),
        ("Time", "duration_s", units.duration),
    )
    columns = [(name, [spell(run[key]) for run in runs]) for name, key, spell in headings]
    columns = [column for column in columns if set(column[1]) != {units.MISSING}]
    if is_narrow and any(final_perplexity(run) is not None for run in runs):
        columns = [column for column in columns if column[0] not in ("Median\nerror", "Tokens/s")]
    if len(dense) == 1:
        columns = [column for column in columns if column[0] != "Dense"]
    return columns, next(iter(dense)) if len(dense) == 1 else None
