"""Methods side by side on real models, by the ordinary commands: one-shot and after recovery."""

from __future__ import annotations

import json
import math
import shlex
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs._bench.arguments import add_option
from jobs._bench.processes import run_logged
from jobs._bench.record import Outcome, Table
from sparsify.errors import InputError, TwofourError

_METHODS = (
    "magnitude", "wanda", "sparsegpt", "resolve", "descent", "admm", "teacher", "twofour",
)  # fmt: skip
_REFERENCE = "sparsegpt"
_NOTES = (
    "perplexity per token and KL(dense, model) in nats per token, on held-out text",
    "excess removed: 1 - (ln ppl - ln dense) / (ln SparseGPT - ln dense); 0 is SparseGPT, 1 is "
    "dense; after recovery, both are taken after recovery",
    "seconds: pruning alone, all workers at work; loading and writing included",
)


@dataclass(frozen=True)
class Model:
    """A model to prune and the text to calibrate it on."""

    name: str
    path: str
    calibration: str


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    models = (
        "models, each with its text as data.calibration of jobs.prune; 'embedded' alone is the "
        "embedded model on stdlib"
    )
    metavar = "NAME=PATH:CALIBRATION"
    add_option(parser, "--models", ["embedded"], models, nargs="+", metavar=metavar)
    methods = f"methods, {_REFERENCE} among them"
    add_option(parser, "--methods", list(_METHODS), methods, nargs="+")
    recover = ["magnitude", _REFERENCE, "twofour"]
    add_option(parser, "--recover", recover, "methods whose result is recovered", nargs="*")
    add_option(parser, "--recover-tokens", 300_000, "tokens of a recovery")
    more = "more options for every command, such as prune.num_samples=64"
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=more)
    page = "Markdown file for the tables, such as docs/quality.md"
    parser.add_argument("--out", type=Path, dest="markdown", metavar="FILE.md", help=page)


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


def run(options: Namespace) -> Outcome:
    """Run the commands (finished stages are reused), collect their figures, write the table.

    Raises:
        InputError: a model that cannot be read, or methods without the reference.
        TwofourError: a command failed; its log is named.
    """
    models = [parse_model(text) for text in options.models]
    if _REFERENCE not in options.methods:
        raise InputError(
            f"--methods: {_REFERENCE} has to be among them, others are held against it"
        )
    if unknown := set(options.recover) - set(options.methods):
        raise InputError(f"--recover {' '.join(sorted(unknown))}: not among --methods")
    folder = options.workdir / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for model in models:
        run_dir = folder / model.name
        _call(prune_words(model, options, run_dir), run_dir.with_suffix(".log"))
        recovered = {}
        for method in options.recover:
            target = folder / f"{model.name}-{method}"
            _call(recover_words(model, options, run_dir, target), target.with_suffix(".log"))
            recovered[method] = target
        figures[model.name] = collect(run_dir, recovered, options.methods)
    settings = {
        "models": [vars(model) for model in models],
        "methods": options.methods,
        "recover_tokens": options.recover_tokens,
        "set": options.set,
    }
    tables = [table_of(name, found) for name, found in figures.items()]
    facts = _summary(folder / models[0].name)["run"]
    settings["num_workers"] = facts["num_workers"]
    outcome = Outcome(facts["device"], 1, settings, figures, tables, [], list(_NOTES))
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(figures, options.command), encoding="utf-8")
    return outcome


def prune_words(model: Model, options: Namespace, run_dir: Path) -> list[str]:
    """The words of the command that prunes with every method and evaluates."""
    *baselines, main_method = sorted(options.methods, key=lambda name: name == "twofour")
    return [
        "jobs.prune", "stages=[prune,evaluate]", f"model.path={model.path}",
        f"data.calibration={model.calibration}", f"prune.method={main_method}",
        f"prune.baselines=[{','.join(baselines)}]", f"run.dir={run_dir}", "tracker.wandb=off",
        *options.set,
    ]  # fmt: skip


def recover_words(model: Model, options: Namespace, run_dir: Path, target: Path) -> list[str]:
    """The words of the command that recovers one method's result and evaluates it."""
    method = target.name.removeprefix(f"{model.name}-")
    return [
        "jobs.prune", "stages=[distill,evaluate]", f"run.from={run_dir / 'prune' / method}",
        f"model.teacher={model.path}", f"data.calibration={model.calibration}",
        f"distill.num_tokens={options.recover_tokens}", f"run.dir={target}", "tracker.wandb=off",
        *options.set,
    ]  # fmt: skip


def _call(words: list[str], log: Path) -> None:
    print(f"python -m {shlex.join(words)}", flush=True)
    if code := run_logged([sys.executable, "-m", *words], log):
        raise TwofourError(f"the command ended with exit code {code}; see {log}")


def collect(
    run_dir: Path, recovered: dict[str, Path], methods: list[str]
) -> dict[str, dict[str, Any]]:
    """Figures of the dense model and every method, from what the commands left.

    Args:
        run_dir: the run that pruned and evaluated.
        recovered: method -> the run that recovered its result.
        methods: in the order of the table.
    """
    results = _results(run_dir)
    record = json.loads((run_dir / "prune" / "record.json").read_text(encoding="utf-8"))
    seconds = record["metrics"].get("seconds") or {}
    dense = results["dense"]["perplexity"]
    afterwards = {method: _results(folder)["recovered"] for method, folder in recovered.items()}
    found: dict[str, dict[str, Any]] = {"dense": _scores(results["dense"])}
    for method in methods:
        row = _scores(results[method])
        row["seconds"] = seconds.get(method)
        row["excess_removed"] = excess_removed(
            row["perplexity"], dense, results[_REFERENCE]["perplexity"]
        )
        if method in afterwards:
            row["recovered"] = _scores(afterwards[method])
            if _REFERENCE in afterwards:
                row["recovered"]["excess_removed"] = excess_removed(
                    afterwards[method]["perplexity"], dense, afterwards[_REFERENCE]["perplexity"]
                )
        found[method] = row
    return found


def excess_removed(perplexity: float, dense: float, reference: float) -> float | None:
    """Share of the reference's excess log-perplexity that is gone; None if it had none."""
    excess = math.log(reference) - math.log(dense)
    return 1 - (math.log(perplexity) - math.log(dense)) / excess if excess > 0 else None


def table_of(name: str, figures: dict[str, dict[str, Any]]) -> Table:
    """One row per method of one model."""
    rows = [
        (
            method,
            _number(row["perplexity"], 3),
            _number(row["kl"], 4),
            _percent(row.get("excess_removed")),
            _number(row.get("seconds"), 1),
            _number(row.get("recovered", {}).get("perplexity"), 3),
            _number(row.get("recovered", {}).get("kl"), 4),
            _percent(row.get("recovered", {}).get("excess_removed")),
        )
        for method, row in figures.items()
    ]
    headings = (
        name, "perplexity", "KL", "excess removed", "seconds", "recovered ppl", "recovered KL",
        "excess removed",
    )  # fmt: skip
    return Table(headings, rows)


def markdown(figures: dict[str, dict[str, dict[str, Any]]], command: str) -> str:
    """The tables of all models as a Markdown page, with the command that made them."""
    parts = [
        "# What the methods keep",
        f"Made by\n\n```\n{command}\n```",
        "\n".join(f"- {note}" for note in _NOTES),
    ]
    for name, found in figures.items():
        table = table_of(name, found)
        lines = [table.headings, ["---", *["---:"] * (len(table.headings) - 1)], *table.rows]
        parts.append(f"## {name}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _results(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Name -> row of a run's summary."""
    return {row["name"]: row for row in _summary(run_dir)["results"]}


def _summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


def _scores(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("perplexity", "kl", "top1_agreement")}


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:,.{decimals}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
