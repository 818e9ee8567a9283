"""A fine-tuned sparse model beside the fine-tuned dense one, on a task made for small models.

The task is letters to be put in order. The dense model and the pruned and recovered one learn the
same records by the ordinary commands, and are asked for others; adapters are merged first. A seed
makes the records and orders them; the pruned model is one for all.
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.benchmarks.support import answers, commands
from jobs.benchmarks.support.arguments import add_option, settings_of
from jobs.benchmarks.support.page import add_page, write_page
from jobs.benchmarks.support.record import Outcome, Table
from sparsify.errors import InputError

SUMMARY = "fine-tuned sparse beside fine-tuned dense: all weights, LoRA, QLoRA"

EXAMPLES = ("finetune --models embedded --seeds 0",)

_TITLE = "Fine-tuned models compared"

_NOTES = (
    "task: letters, different ones of sixteen, to be put in order; the records that are asked for "
    "are none of those that were learned",
    "exact: share of the records whose whole answer is the likeliest at each of its tokens, the "
    "end token included (what greedy writing gives); loss: nats per token of the answers",
    "mean over the seeds, and from the least to the most; a seed makes the records, and orders "
    "them, and starts the adapters; the pruned model is one for all",
    "recovery: exact matches over the dense model's of the same seed",
    "violations: pruned weights of the written models that are not zero, over all seeds",
    "cut: share of the adapters' change, by its squared norm, that the merge cut away",
)


@dataclass(frozen=True)
class Side:
    """One way to learn the task."""

    title: str
    words: tuple[str, ...] = ()
    is_dense: bool = False

    @property
    def has_adapter(self) -> bool:
        """Whether adapters learn, which take a rate of their own."""
        return bool(self.words)


_SIDES = {
    "dense": Side("dense, all weights", is_dense=True),
    "sparse": Side("2:4, all weights"),
    "lora-masked": Side("2:4, LoRA masked", ("finetune.adapter=lora", "finetune.merge=masked")),
    "lora-at-merge": Side(
        "2:4, LoRA cut at the merge", ("finetune.adapter=lora", "finetune.merge=at_merge")
    ),
    "qlora": Side("2:4, QLoRA masked", ("finetune.adapter=qlora", "finetune.merge=masked")),
}
"""name in options, folders and the record -> side, in the order of the table"""


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    commands.add_models(parser)
    add_option(parser, "--sides", list(_SIDES), "sides", nargs="+", choices=list(_SIDES))
    add_option(parser, "--seeds", [0, 1, 2], "seeds", nargs="+", type=int)
    add_option(parser, "--method", "sparsegpt", "method of the pruned model")
    add_option(parser, "--recover-tokens", 100_000, "tokens of its recovery")
    add_option(parser, "--letters", 8, "letters of a record, at most 16")
    add_option(parser, "--records", 1000, "records that are learned")
    add_option(parser, "--heldout", 500, "records that are asked for")
    add_option(parser, "--epochs", 4, "times that each is used")
    add_option(parser, "--rate", 1e-3, "learning rate of all weights")
    add_option(parser, "--adapter-rate", 1e-2, "learning rate of adapters")
    add_page(parser, "docs/finetune.md")


def run(options: Namespace) -> Outcome:
    """Run the commands (finished stages are reused), ask the models, write the table.

    Raises:
        InputError: a model that cannot be read, no dense side, or a task that cannot be made.
        TwofourError: a command failed; its log is named.
    """
    models = [commands.parse_model(text) for text in options.models]
    if "dense" not in options.sides:
        raise InputError("--sides: dense has to be among them, others are held against it")
    folder = options.workdir / "finetune"
    folder.mkdir(parents=True, exist_ok=True)
    asked = {}
    for seed in options.seeds:
        sizes = (options.letters, options.records, options.heldout, seed)
        for part, records in answers.make_records(*sizes).items():
            answers.write_records(records, folder / f"{part}-{seed}.jsonl")
        asked[seed] = folder / f"heldout-{seed}.jsonl"
    figures: dict[str, Any] = {}
    for model in models:
        runs = planned(model, options, folder)
        for words in runs.values():
            commands.run_command(words)
        figures[model.name] = collect(model, options, folder, asked)
        facts = commands.summary_of(folder / f"{model.name}-pruned")["run"]
    names = ("sides", "seeds", "method", "recover_tokens", "letters", "records", "heldout",
             "epochs", "rate", "adapter_rate", "set")  # fmt: skip
    settings = {
        "models": [vars(model) for model in models], **settings_of(options, *names),
        "num_workers": facts["num_workers"],
    }  # fmt: skip
    tables = [table_of(name, found) for name, found in figures.items()]
    if options.markdown is not None:
        write_page(options.markdown, markdown(figures, options.command), options.place, _TITLE)
    return Outcome(
        facts["device"], 1, settings, figures, tables, [], list(_NOTES),
        summary={"figures": figures},
    )  # fmt: skip


def planned(model: commands.Model, options: Namespace, folder: Path) -> dict[str, list[str]]:
    """Name -> words of its command: the pruned model, then every side with every seed."""
    more = ["tracker.wandb=off", "cluster.executor=plain", "cluster.num_workers=1", *options.set]
    pruned = folder / f"{model.name}-pruned"
    found = {
        "pruned": [
            "jobs.prune", "stages=[prune,distill,evaluate]", f"model.path={model.path}",
            f"data.calibration={model.calibration}", f"prune.method={options.method}",
            "prune.baselines=[]", f"distill.num_tokens={options.recover_tokens}",
            f"run.dir={pruned}", "evaluate.num_new_tokens=0", *more,
        ]
    }  # fmt: skip
    for name, seed in pairs(options):
        side = _SIDES[name]
        start = f"model.path={model.path}" if side.is_dense else f"run.from={pruned / 'distill'}"
        rate = options.adapter_rate if side.has_adapter else options.rate
        found[f"{name}-{seed}"] = [
            "jobs.finetune", start, f"finetune.data={folder / f'train-{seed}.jsonl'}",
            "finetune.template=raw", f"finetune.epochs={options.epochs}", "finetune.batch_size=8",
            f"finetune.learning_rate={rate}", *side.words, f"run.seed={seed}",
            f"run.dir={run_of(folder, model, name, seed)}", *more,
        ]  # fmt: skip
    return found


def pairs(options: Namespace) -> list[tuple[str, int]]:
    """(side, seed) of every run of one model, in the order of the table."""
    return [(name, seed) for name in _SIDES if name in options.sides for seed in options.seeds]


def run_of(folder: Path, model: commands.Model, name: str, seed: int) -> Path:
    """Folder of one side's run."""
    return folder / f"{model.name}-{name}-seed{seed}"


def collect(
    model: commands.Model, options: Namespace, folder: Path, asked: dict[int, Path],
    score: Callable[[Path | str, Path], dict[str, float]] = answers.score_answers,
) -> dict[str, Any]:  # fmt: skip
    """Figures of one model, from what the commands left and what the models answer.

    Args:
        model, options, folder: of the runs.
        asked: seed -> records that are asked for.
        score: how a model's answers are scored.
    """
    pruned = folder / f"{model.name}-pruned"
    results = commands.results_of(pruned)
    first = next(iter(asked.values()))
    before: dict[str, Path | str] = {
        "dense": model.path,
        "sparse": pruned / "distill" / "model",
    }
    rows = []
    for name, seed in pairs(options):
        run_dir = run_of(folder, model, name, seed)
        metrics = commands.stage_metrics(run_dir, "finetune")
        rows.append(
            {
                "side": name, "seed": seed, **score(run_dir / "finetune" / "model", asked[seed]),
                "num_violations": metrics["gate"]["num_violations"],
                "cut_share": (metrics["adapter"] or {}).get("cut_share"),
                "num_tokens": metrics["num_tokens"],
                "seconds": metrics["num_tokens"] / metrics["tokens_per_s"],
            }
        )  # fmt: skip
    dense = {row["seed"]: row["exact_match"] for row in rows if row["side"] == "dense"}
    for row in rows:
        whole = dense[row["seed"]]
        row["recovery"] = row["exact_match"] / whole if whole else None
    return {
        "perplexity": {name: results[name]["perplexity"] for name in ("dense", "recovered")},
        "before": {name: score(path, first) for name, path in before.items()},
        "rows": rows,
    }


def table_of(name: str, figures: dict[str, Any]) -> Table:
    """One row per side of one model, with what there was before fine-tuning on top."""
    rows = []
    for start, title in (("dense", "dense, before"), ("sparse", "2:4 recovered, before")):
        found = figures["before"][start]
        cells = (commands.percent(found["exact_match"]), commands.number(found["loss"], 3))
        rows.append((title, *cells, "", "", "", ""))
    for side in _SIDES:
        found = [row for row in figures["rows"] if row["side"] == side]
        if not found:
            continue
        is_dense = _SIDES[side].is_dense
        rows.append(
            (
                _SIDES[side].title,
                spread([row["exact_match"] for row in found], commands.percent),
                commands.number(statistics.mean(row["loss"] for row in found), 3),
                spread([row["recovery"] for row in found], commands.percent),
                "" if is_dense else str(sum(row["num_violations"] for row in found)),
                commands.percent(found[0]["cut_share"]),
                commands.number(statistics.mean(row["seconds"] for row in found), 0),
            )
        )
    headings = (name, "exact", "loss", "recovery", "violations", "cut", "seconds")
    return Table(headings, rows)


def spread(values: list[float | None], shown: Callable[[float | None], str]) -> str:
    """Mean with the least and the most: "50.0 % (40.0 to 60.0)"; empty where one is unknown."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    ends = [shown(value).removesuffix(" %") for value in (min(known), max(known))]
    mean = shown(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ({ends[0]} to {ends[1]})"


def markdown(figures: dict[str, dict[str, Any]], command: str) -> str:
    """The tables of all models in Markdown, with the command that made them."""
    parts = [f"Made by\n\n```\n{command}\n```", "\n".join(f"- {note}" for note in _NOTES)]
    parts += [commands.markdown_table(table_of(name, found)) for name, found in figures.items()]
    return "\n\n".join(parts)
