"""Benchmarks that run the ordinary commands on real models: the models, the runs, their figures.

A run's folder is in the work folder. The same command reuses what is finished there, and refuses a
folder that was made with other options.
"""

from __future__ import annotations

import json
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.benchmarks.support.arguments import add_option, add_set
from jobs.benchmarks.support.processes import run_logged
from jobs.benchmarks.support.record import Table
from sparsify.errors import InputError, TwofourError


@dataclass(frozen=True)
class Model:
    """A model to prune and the text to calibrate it on."""

    name: str
    path: str
    calibration: str


def add_models(parser: ArgumentParser) -> None:
    """--models and --set, for `run_command`."""
    models = (
        "models, each with its text as data.calibration of jobs.prune; 'embedded' alone is the "
        "embedded model on stdlib"
    )
    metavar = "NAME=PATH:CALIBRATION"
    add_option(parser, "--models", ["embedded"], models, nargs="+", metavar=metavar)
    add_set(parser, "every command")


def parse_model(text: str) -> Model:
    """`embedded`, or NAME=PATH:CALIBRATION.

    Raises:
        InputError: any other text.
    """
    if text == "embedded":
        return Model("embedded", "embedded", "stdlib")
    name, equals, rest = text.partition("=")
    path, colon, calibration = rest.partition(":")
    if not (equals and colon and name and path and calibration):
        raise InputError(f"--models {text}: write NAME=PATH:CALIBRATION, or embedded")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"--models {text}: a name has letters, digits, '-' and '_' only")
    return Model(name, path, calibration)


def run_command(words: list[str]) -> None:
    """Run `python -m WORDS` to its end, its output in a file beside the folder of run.dir.

    Raises:
        TwofourError: it failed; its log is named.
    """
    print(f"python -m {shlex.join(words)}", flush=True)
    run_dir = next(word for word in words if word.startswith("run.dir="))
    log = Path(run_dir.removeprefix("run.dir=")).with_suffix(".log")
    if code := run_logged([sys.executable, "-m", *words], log):
        raise TwofourError(f"the command ended with exit code {code}; see {log}")


def summary_of(run_dir: Path) -> dict[str, Any]:
    """A run's summary."""
    return dict(json.loads((run_dir / "summary.json").read_text(encoding="utf-8")))


def results_of(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Name -> row of a run's summary."""
    return {row["name"]: row for row in summary_of(run_dir)["results"]}


def stage_metrics(run_dir: Path, stage: str) -> dict[str, Any]:
    """What a finished stage of a run measured."""
    record = json.loads((run_dir / stage / "record.json").read_text(encoding="utf-8"))
    return dict(record["metrics"])


def scores_of(row: dict[str, Any]) -> dict[str, Any]:
    """Of a row of the summary, how good the model is."""
    return {key: row[key] for key in ("perplexity", "kl", "top1_agreement")}


def number(value: float | None, decimals: int) -> str:
    """Text for a cell of a table; empty for None."""
    return "" if value is None else f"{value:,.{decimals}f}"


def percent(value: float | None) -> str:
    """A share as text for a cell of a table; empty for None."""
    return "" if value is None else f"{100 * value:.1f} %"


def markdown_table(table: Table) -> str:
    """The table in Markdown, names to the left and figures to the right."""
    lines: list[Sequence[str]] = [
        table.headings, ["---", *["---:"] * (len(table.headings) - 1)], *table.rows,
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
