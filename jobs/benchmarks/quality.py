"""Methods side by side on real models, by the ordinary commands: one-shot and after recovery."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from jobs.benchmarks.support import commands
from jobs.benchmarks.support.arguments import add_option, settings_of
from jobs.benchmarks.support.record import Outcome, Table, Target
from sparsify.errors import InputError

SUMMARY = "methods side by side on real models: perplexity, one-shot and recovered"

EXAMPLES = (
    "quality --models embedded --out docs/benchmarks/quality.md",
    'quality --methods sparsegpt twofour "twofour, searched in half" --recover --repeat 1',
)

PLAIN = "twofour, not rotated"

HALF = "twofour, searched in half"

_ALONE = ["prune.method=twofour", "prune.baselines=[]"]

_OWN_RUN = {
    PLAIN: [*_ALONE, "prune.rotation_steps=0"],
    HALF: [*_ALONE, "prune.search_precision=half"],
}
"""rows of the table that are no method of their own -> what their run is told"""

_METHODS = (
    "magnitude", "wanda", "sparsegpt", "sparsegpt_refit", "group_descent", "admm",
    "sparsegpt_teacher", PLAIN, "twofour",
)  # fmt: skip

_REFERENCE = "sparsegpt"

_NOTES = (
    "perplexity per token and KL(dense, model) in nats per token, on held-out text",
    "excess removed: 1 - (ln ppl - ln dense) / (ln SparseGPT - ln dense); 0 is SparseGPT, 1 is "
    "dense; after recovery, both are taken after recovery",
    "seconds: pruning alone, all workers at work; loading, rotating and writing included; the "
    "fastest of --repeat runs, and beside it how often SparseGPT's fit into it",
    "each method measures its inputs in the order that it has by default (prune.order=auto), and "
    "twofour alone has its model rotated first (prune.rotation_steps=null)",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    commands.add_models(parser)
    methods = f"methods, {_REFERENCE} among them"
    add_option(parser, "--methods", list(_METHODS), methods, nargs="+")
    recover = ["magnitude", _REFERENCE, PLAIN, "twofour"]
    add_option(parser, "--recover", recover, "methods whose result is recovered", nargs="*")
    add_option(parser, "--recover-tokens", 300_000, "tokens of a recovery")
    add_option(parser, "--repeat", 3, "prunings of each method, for the time")
    page = "Markdown file for the tables, such as docs/benchmarks/quality.md"
    parser.add_argument("--out", type=Path, dest="markdown", metavar="FILE.md", help=page)


def run(options: Namespace) -> Outcome:
    """Run the commands (finished stages are reused), collect their figures, write the table.

    Raises:
        InputError: a model that cannot be read, or methods without the reference.
        TwofourError: a command failed; its log is named.
    """
    models = [commands.parse_model(text) for text in options.models]
    if _REFERENCE not in options.methods:
        raise InputError(
            f"--methods: {_REFERENCE} has to be among them, others are held against it"
        )
    if unknown := set(options.recover) - set(options.methods):
        raise InputError(f"--recover {' '.join(sorted(unknown))}: not among --methods")
    if options.repeat < 1:
        raise InputError(f"--repeat {options.repeat}: at least 1")
    folder = options.workdir / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for model in models:
        runs: dict[str, list[Path]] = {}
        for method in options.methods:
            words = _OWN_RUN.get(method)
            run_dir = folder / (model.name if words is None else f"{model.name}-{_slug(method)}")
            again = [run_dir.with_name(f"{run_dir.name}-{n}") for n in range(2, options.repeat + 1)]
            if [run_dir, *again] not in runs.values():
                commands.run_command(prune_words(model, options, run_dir, words))
                for other in again:
                    commands.run_command(
                        prune_words(model, options, other, words, stages="[prune]")
                    )
            runs[method] = [run_dir, *again]
        recovered = {}
        for method in options.recover:
            target = folder / f"{model.name}-{_slug(method)}-recovered"
            commands.run_command(recover_words(model, options, runs[method][0], target, method))
            recovered[method] = target
        figures[model.name] = collect(runs, recovered)
    settings = {
        "models": [vars(model) for model in models],
        **settings_of(options, "methods", "recover_tokens", "repeat", "set"),
    }
    tables = [table_of(name, found) for name, found in figures.items()]
    facts = commands.summary_of(folder / models[0].name)["run"]
    settings["num_workers"] = facts["num_workers"]
    targets = [target for name, found in figures.items() for target in targets_of(name, found)]
    outcome = Outcome(facts["device"], 1, settings, figures, tables, targets, list(_NOTES))
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(figures, options.command), encoding="utf-8")
    return outcome


def _slug(method: str) -> str:
    return method.replace(", ", "-").replace(" ", "-")


def _stage_name(method: str) -> str:
    """The method's name in a run's folder and summary."""
    return method.partition(",")[0]


def prune_words(
    model: commands.Model, options: Namespace, run_dir: Path, own: list[str] | None = None,
    stages: str = "[prune,evaluate]",
) -> list[str]:  # fmt: skip
    """The words of the command that prunes and evaluates: with every method, or one row alone."""
    methods = [name for name in options.methods if name not in _OWN_RUN]
    *baselines, main_method = sorted(methods, key=lambda name: name == "twofour")
    together = [f"prune.method={main_method}", f"prune.baselines=[{','.join(baselines)}]"]
    return [
        "jobs.prune", f"stages={stages}", f"model.path={model.path}",
        f"data.calibration={model.calibration}", *(own or together), f"run.dir={run_dir}",
        "tracker.wandb=off", *options.set,
    ]  # fmt: skip


def recover_words(
    model: commands.Model, options: Namespace, run_dir: Path, target: Path, method: str
) -> list[str]:
    """The words of the command that recovers one method's result and evaluates it."""
    source = run_dir / "prune" / _stage_name(method)
    return [
        "jobs.prune", "stages=[distill,evaluate]", f"run.from={source}",
        f"model.teacher={model.path}", f"data.calibration={model.calibration}",
        f"distill.num_tokens={options.recover_tokens}", f"run.dir={target}", "tracker.wandb=off",
        *options.set,
    ]  # fmt: skip


def collect(runs: dict[str, list[Path]], recovered: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Figures of the dense model and every method, from what the commands left.

    Args:
        runs: method, in the order of the table -> all runs that pruned with it; the first of them
            also evaluated.
        recovered: method -> the run that recovered its result.
    """

    def fastest_s(method: str) -> float | None:
        found = [
            commands.stage_metrics(folder, "prune").get("seconds") or {} for folder in runs[method]
        ]
        return min(
            (s[_stage_name(method)] for s in found if _stage_name(method) in s), default=None
        )

    reference_s = fastest_s(_REFERENCE)
    reference = commands.results_of(runs[_REFERENCE][0])
    dense = reference["dense"]["perplexity"]
    afterwards = {
        method: commands.results_of(folder)["recovered"] for method, folder in recovered.items()
    }
    found: dict[str, dict[str, Any]] = {"dense": commands.scores_of(reference["dense"])}
    for method, (run_dir, *_) in runs.items():
        row = commands.scores_of(commands.results_of(run_dir)[_stage_name(method)])
        row["seconds"] = seconds = fastest_s(method)
        row["time_ratio"] = seconds / reference_s if seconds and reference_s else None
        row["excess_removed"] = excess_removed(
            row["perplexity"], dense, reference[_REFERENCE]["perplexity"]
        )
        if method in afterwards:
            row["recovered"] = commands.scores_of(afterwards[method])
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


def targets_of(name: str, figures: dict[str, dict[str, Any]]) -> list[Target]:
    """What the default method promises for a model."""
    default = figures.get("twofour", {})
    targets = []
    if (removed := default.get("excess_removed")) is not None:
        targets.append(Target.at_least(f"{name}: excess removed by twofour", 0.5, removed))
    if (ratio := default.get("time_ratio")) is not None:
        targets.append(Target.at_most(f"{name}: twofour's time over SparseGPT's", 2.0, ratio))
    return targets


def table_of(name: str, figures: dict[str, dict[str, Any]]) -> Table:
    """One row per method of one model."""
    rows = [
        (
            method,
            commands.number(row["perplexity"], 3),
            commands.number(row["kl"], 4),
            commands.percent(row.get("excess_removed")),
            commands.number(row.get("seconds"), 1),
            commands.number(row.get("time_ratio"), 2),
            commands.number(row.get("recovered", {}).get("perplexity"), 3),
            commands.number(row.get("recovered", {}).get("kl"), 4),
            commands.percent(row.get("recovered", {}).get("excess_removed")),
        )
        for method, row in figures.items()
    ]
    headings = (
        name, "perplexity", "KL", "excess removed", "seconds", "ratio", "recovered ppl",
        "recovered KL", "excess removed",
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
        parts.append(f"## {name}\n\n{commands.markdown_table(table_of(name, found))}")
    return "\n\n".join(parts) + "\n"
