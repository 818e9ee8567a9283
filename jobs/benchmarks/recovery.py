"""Recipes of the recovery side by side: losses, masks that stay or move, a dense model continued.

All start from one pruned model (or from dense weights in its basis, under its masks), train on as
many tokens in the same order, and are evaluated on the same held-out text, by the ordinary
commands. The dense model continued on those tokens shows what the text alone gives, without any
pruning.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.benchmarks.support import commands
from jobs.benchmarks.support.arguments import add_option, settings_of
from jobs.benchmarks.support.page import add_page, write_page
from jobs.benchmarks.support.record import Outcome, Table

SUMMARY = "losses and moving masks compared at equal tokens, beside a dense model continued"

EXAMPLES = ("recovery --models embedded --recipes kl ce dense-ce",)

_TITLE = "Recipes of the recovery compared"

_NOTES = (
    "perplexity per token and KL(dense, model) in nats per token, on held-out text",
    "gap recovered: (ln pruned - ln ppl) / (ln pruned - ln dense); over 100 % is better than dense",
    "over continued: ppl / (the lowest ppl of the dense model continued on the same tokens) - 1",
    "masks moved: weights kept at the end that were pruned at the start, as a share of the kept",
    "seconds: training steps alone; the load of the machine is in the record",
    "a seed decides which rows are trained on and their order; the pruned model is one for all",
)


@dataclass(frozen=True)
class Recipe:
    """One way to train, as options of the distill stage."""

    title: str
    words: tuple[str, ...]
    is_dense: bool = False
    """starts from the dense model, every weight kept, in place of the pruned one"""


def _losses(**weights: float) -> tuple[str, ...]:
    """Options for exactly these weights; all others are 0."""
    names = ("kl", "reverse_kl", "ce", "square_head")
    return tuple(f"distill.{name}_weight={weights.get(name, 0.0)}" for name in names)


def _moving(share: float, start: str = "given") -> tuple[str, ...]:
    """Masks that are taken again in every step of that share, as SR-STE's authors do."""
    moving = (f"distill.moving_share={share}", "distill.mask_refresh_steps=1")
    return (*_losses(kl=1.0), *moving, f"distill.moving_start={start}")


_WANING = "distill.schedule=[square_head_weight:0@0.1]"

_RECIPES = {
    "kl": Recipe("KL", _losses(kl=1.0)),
    "kl-t2": Recipe("KL, T = 2", (*_losses(kl=1.0), "distill.temperature=2.0")),
    "reverse-kl": Recipe("reverse KL", _losses(reverse_kl=1.0)),
    "kl-both": Recipe("0.5 KL + 0.5 reverse KL", _losses(kl=0.5, reverse_kl=0.5)),
    "ce": Recipe("CE", _losses(ce=1.0)),
    "ce-kl": Recipe("0.33 CE + 0.67 KL", _losses(ce=0.33, kl=0.67)),
    "kl-squarehead-tenth": Recipe(
        "KL + SquareHead over the first tenth", (*_losses(kl=1.0, square_head=1.0), _WANING)
    ),
    "ce-squarehead": Recipe("CE + SquareHead", _losses(ce=1.0, square_head=1.0)),
    "kl-moving": Recipe("KL, masks move for a quarter", _moving(0.25)),
    "kl-moving-half": Recipe("KL, masks move for a half", _moving(0.5)),
    "kl-moving-dense": Recipe("KL, from dense, masks move for a quarter", _moving(0.25, "dense")),
    "kl-moving-dense-half": Recipe("KL, from dense, masks move for a half", _moving(0.5, "dense")),
    "dense-ce": Recipe("dense continued, CE", _losses(ce=1.0), is_dense=True),
    "dense-ce-low": Recipe(
        "dense continued, CE, a tenth of the rate",
        (*_losses(ce=1.0), "distill.learning_rate=0.0001"), is_dense=True,
    ),
}  # fmt: skip
"""name in options, folders and the record -> recipe, in the order of the table"""


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    commands.add_models(parser)
    add_option(parser, "--recipes", list(_RECIPES), "recipes", nargs="+", choices=list(_RECIPES))
    again = ["kl", "kl-squarehead-tenth", "kl-moving"]
    repeated = "of these, those that run with seed 1 too, which shows the noise"
    add_option(parser, "--repeat", again, repeated, nargs="*", choices=list(_RECIPES))
    start = "method of the pruned model that they start from"
    add_option(parser, "--start", "sparsegpt", start)
    add_option(parser, "--tokens", 300_000, "tokens of every recipe")
    add_page(parser, "docs/benchmarks/recovery.md")


def run(options: Namespace) -> Outcome:
    """Run the commands (finished stages are reused), collect their figures, write the tables.

    Raises:
        InputError: a model that cannot be read.
        TwofourError: a command failed; its log is named.
    """
    models = [commands.parse_model(text) for text in options.models]
    folder = options.workdir / "recovery"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for model in models:
        start = folder / f"{model.name}-{options.start}"
        commands.run_command(prune_words(model, options, start))
        found = {}
        for name, seed in planned(options):
            target = folder / f"{start.name}-{name}-seed{seed}"
            commands.run_command(recover_words(model, options, start, target, name, seed))
            found[name, seed] = target
        figures[model.name] = collect(start, options.start, found)
        facts = commands.summary_of(start)["run"]
    settings = {
        "models": [vars(model) for model in models],
        "recipes": {name: list(_RECIPES[name].words) for name in options.recipes},
        **settings_of(options, "start", "tokens", "set"),
        "num_workers": facts["num_workers"],
    }
    tables = [table_of(name, found) for name, found in figures.items()]
    if options.markdown is not None:
        tables_text = markdown(figures, options.command)
        write_page(options.markdown, tables_text, options.place, _TITLE)
    return Outcome(facts["device"], 1, settings, figures, tables, [], list(_NOTES))


def planned(options: Namespace) -> list[tuple[str, int]]:
    """(recipe, seed) of every run of one model, in the order of the table."""
    return [
        (name, seed)
        for name in _RECIPES
        if name in options.recipes
        for seed in ((0, 1) if name in options.repeat else (0,))
    ]


def prune_words(model: commands.Model, options: Namespace, run_dir: Path) -> list[str]:
    """The words of the command that makes the pruned model."""
    return [
        "jobs.prune", "stages=[prune,evaluate]", f"model.path={model.path}",
        f"data.calibration={model.calibration}", f"prune.method={options.start}",
        "prune.baselines=[]", f"run.dir={run_dir}", "tracker.wandb=off", *options.set,
    ]  # fmt: skip


def recover_words(
    model: commands.Model, options: Namespace, start: Path, target: Path, name: str, seed: int
) -> list[str]:
    """The words of the command that trains by one recipe and evaluates what comes of it."""
    recipe = _RECIPES[name]
    source = [f"run.from={start / 'prune' / options.start}"]
    if recipe.is_dense:  # with every layer skipped there are no zeros to hold
        source = [f"run.from={model.path}", 'prune.skip=["*"]']
    return [
        "jobs.prune", "stages=[distill,evaluate]", *source, f"model.teacher={model.path}",
        f"data.calibration={model.calibration}", f"run.seed={seed}",
        f"distill.num_tokens={options.tokens}", *recipe.words, f"run.dir={target}",
        "tracker.wandb=off", *options.set,
    ]  # fmt: skip


def collect(start: Path, method: str, found: dict[tuple[str, int], Path]) -> dict[str, Any]:
    """Figures of the dense model, the pruned one and every run, from what the commands left.

    Args:
        start: the run that pruned.
        method: of the pruned model.
        found: (recipe, seed) -> its run.
    """
    before = commands.results_of(start)
    dense, pruned = before["dense"]["perplexity"], before[method]["perplexity"]
    rows = []
    for (name, seed), run_dir in found.items():
        row = {
            "recipe": name,
            "seed": seed,
            **commands.scores_of(commands.results_of(run_dir)["recovered"]),
        }
        metrics = commands.stage_metrics(run_dir, "distill")
        row["gap_recovered"] = gap_recovered(row["perplexity"], dense, pruned)
        row["mask_share_moved"] = metrics["mask_share_moved"]
        row["num_tokens"] = metrics["num_tokens"]
        row["seconds"] = metrics["num_tokens"] / metrics["tokens_per_s"]
        rows.append(row)
    continued = [row["perplexity"] for row in rows if _RECIPES[row["recipe"]].is_dense]
    for row in rows:
        row["over_continued"] = row["perplexity"] / min(continued) - 1 if continued else None
    return {
        "dense": commands.scores_of(before["dense"]),
        "pruned": {"method": method, **commands.scores_of(before[method])},
        "rows": rows,
    }


def gap_recovered(perplexity: float, dense: float, pruned: float) -> float | None:
    """Share of the log-perplexity lost by pruning that is won back; None if none was lost."""
    lost = math.log(pruned) - math.log(dense)
    return (math.log(pruned) - math.log(perplexity)) / lost if lost > 0 else None


def table_of(name: str, figures: dict[str, Any]) -> Table:
    """One row per run of one model, the dense and the pruned model on top."""
    method = figures["pruned"]["method"]
    rows = [_cells("dense", figures["dense"]), _cells(f"pruned, {method}", figures["pruned"])]
    for row in figures["rows"]:
        title = _RECIPES[row["recipe"]].title
        rows.append(_cells(f"{title}, seed {row['seed']}" if row["seed"] else title, row))
    headings = (
        name, "perplexity", "KL", "top-1", "gap recovered", "over continued", "masks moved",
        "seconds",
    )  # fmt: skip
    return Table(headings, rows)


def _cells(title: str, row: dict[str, Any]) -> Sequence[str]:
    return (
        title,
        commands.number(row["perplexity"], 3),
        commands.number(row["kl"], 4),
        commands.percent(row["top1_agreement"]),
        commands.percent(row.get("gap_recovered")),
        commands.percent(row.get("over_continued")),
        commands.percent(row.get("mask_share_moved")),
        commands.number(row.get("seconds"), 0),
    )


def markdown(figures: dict[str, dict[str, Any]], command: str) -> str:
    """The tables of all models in Markdown, with the command that made them."""
    parts = [f"Made by\n\n```\n{command}\n```", "\n".join(f"- {note}" for note in _NOTES)]
    for name, found in figures.items():
        parts.append(f"### {name}\n\n{commands.markdown_table(table_of(name, found))}")
    return "\n\n".join(parts)
