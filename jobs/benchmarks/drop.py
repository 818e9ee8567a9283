"""Layers dropped by each rule, healed or not, and dropping beside 2:4 pruning in both orders.

All is done by the ordinary commands. A rule's model is scored as it is and after a recovery from
the dense model; one rule's is healed by QLoRA too. The two orders end with as many weights, and
train on as many tokens in all.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.benchmarks.recovery import gap_recovered
from jobs.benchmarks.support import commands
from jobs.benchmarks.support.arguments import add_option, settings_of
from jobs.benchmarks.support.page import add_page, write_page
from jobs.benchmarks.support.record import Outcome, Table
from sparsify.errors import InputError

SUMMARY = "rules for dropping layers, before and after healing, and both orders with 2:4"

EXAMPLES = ("drop --models embedded --tokens 100000",)

_TITLE = "Dropped layers compared"

_NOTES = (
    "perplexity per token and KL(dense, model) in nats per token, on held-out text",
    "gap healed: (ln dropped - ln healed) / (ln dropped - ln dense)",
    "healed by distillation: the distill stage's defaults, the dense model as teacher; by QLoRA: "
    "recipe heal-qlora (adapters of the MLP alone, no teacher) with the row length, rank, rate, "
    "warm-up and precision of the settings",
    "sublayers: as many attentions and MLPs as two for each layer; they are dropped by zeros and "
    "leave the model its size",
    "orders: both prune with the same method and train on as many tokens in all; each drop chooses "
    "by itself, from the model that it is given",
    "a seed decides which rows are trained on and their order, and the rows that are calibrated on",
)

_HEAL = (
    "recipe=heal-qlora", "finetune.rank=8", "finetune.alpha=8", "finetune.learning_rate=0.01",
    "finetune.num_warmup_steps=5", "finetune.micro_batch_size=8", "finetune.precision=fp32",
    "data.sequence_length=256",
)  # fmt: skip
"""the published recipe for models of billions of weights, brought to small ones and few steps"""

_ORDERS = {
    "pruned": "prune, recover",
    "first": "drop, prune, recover",
    "last": "prune, recover, drop, recover",
}
"""name of a run -> what it does, in the order of the table"""


@dataclass(frozen=True)
class Rule:
    """One way to choose what goes."""

    title: str
    words: tuple[str, ...]
    units: int = 1
    """units to drop for each layer"""


_RULES = {
    "angular": Rule("angular", ("drop.rule=angular",)),
    "deepest": Rule("deepest", ("drop.rule=deepest",)),
    "greedy": Rule("greedy", ("drop.rule=greedy",)),
    "greedy-sublayers": Rule(
        "greedy, sublayers", ("drop.rule=greedy", "drop.candidates=[attention,mlp]"), units=2
    ),
}
"""name in options, folders and the record -> rule, in the order of the table"""


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    commands.add_models(parser)
    add_option(parser, "--rules", list(_RULES), "rules", nargs="+", choices=list(_RULES))
    add_option(parser, "--layers", 1, "layers to drop")
    add_option(parser, "--tokens", 100_000, "tokens of every healing")
    qlora = "rule whose model is healed by QLoRA too; none: no such row"
    add_option(parser, "--qlora", "angular", qlora, choices=[*_RULES, "none"])
    add_option(parser, "--order-rule", "greedy", "rule of both orders", choices=list(_RULES)[:-1])
    add_option(parser, "--method", "sparsegpt", "method of both orders")
    seeds = "seeds of both orders, which show the noise"
    add_option(parser, "--seeds", [0, 1], seeds, nargs="+", type=int)
    add_page(parser, "docs/drop.md")


def run(options: Namespace) -> Outcome:
    """Run the commands (finished stages are reused), collect their figures, write the tables.

    Raises:
        InputError: a model that cannot be read, or a rule for QLoRA that is not run.
        TwofourError: a command failed; its log is named.
    """
    models = [commands.parse_model(text) for text in options.models]
    if options.qlora not in (*options.rules, "none"):
        raise InputError(f"--qlora {options.qlora}: not among --rules; add it there, or use none")
    figures: dict[str, Any] = {}
    for model in models:
        runs = planned(model, options, options.workdir / "drop")
        for run_dir, words in runs.items():
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            commands.run_command(words)
        figures[model.name] = collect(options, {run_dir.name: run_dir for run_dir in runs})
        facts = commands.summary_of(next(iter(runs)))["run"]
    names = ("rules", "layers", "tokens", "qlora", "order_rule", "method", "seeds", "set")
    settings = {
        "models": [vars(model) for model in models], **settings_of(options, *names),
        "heal_qlora": list(_HEAL), "num_workers": facts["num_workers"],
    }  # fmt: skip
    tables = [table for name in figures for table in tables_of(name, figures[name])]
    if options.markdown is not None:
        text = markdown(figures, options.command)
        write_page(options.markdown, text, options.place, _TITLE)
    summary = {"figures": figures}
    return Outcome(
        facts["device"], 1, settings, figures, tables, [], list(_NOTES), summary=summary
    )  # fmt: skip


def planned(model: commands.Model, options: Namespace, folder: Path) -> dict[Path, list[str]]:
    """Run folder -> words of its command, in the order in which they build on each other.

    Its last part names the run: a rule, `qlora`, and of each seed S `pruned-S`, `first-S` and
    `last-S`, which are the 2:4 model alone, dropping before it and dropping after it.
    """
    own = folder / model.name
    tokens = f"distill.num_tokens={options.tokens}"
    found: dict[str, list[str]] = {}

    def add(name: str, stages: str, *words: str, source: Path | None = None) -> None:
        start = f"model.path={model.path}" if source is None else f"run.from={source}"
        found[name] = [
            "jobs.prune", f"stages=[{stages}]", start, f"data.calibration={model.calibration}",
            *words, f"run.dir={own / name}", "evaluate.num_new_tokens=0", "tracker.wandb=off",
            "cluster.executor=plain", "cluster.num_workers=1", *options.set,
        ]  # fmt: skip

    for name in _RULES:
        if name in options.rules:
            add(name, "drop,distill,evaluate", *_dropping(name, options.layers), tokens)
    if options.qlora != "none":
        text = (f"finetune.data={model.calibration}", f"finetune.num_tokens={options.tokens}")
        source = own / options.qlora / "drop"
        add("qlora", "finetune,evaluate", *_HEAL, *text, source=source)
    dropping = _dropping(options.order_rule, options.layers)
    pruning = (f"prune.method={options.method}", "prune.baselines=[]")
    both = f"distill.num_tokens={2 * options.tokens}"
    for seed in options.seeds:
        seeded = f"run.seed={seed}"
        add(f"pruned-{seed}", "prune,distill,evaluate", *pruning, tokens, seeded)
        add(f"first-{seed}", "drop,prune,distill,evaluate", *dropping, *pruning, both, seeded)
        source = own / f"pruned-{seed}"
        add(f"last-{seed}", "drop,distill,evaluate", *dropping, tokens, seeded, source=source)
    return {own / name: words for name, words in found.items()}


def _dropping(rule: str, num_layers: int) -> tuple[str, ...]:
    known = _RULES[rule]
    return (*known.words, f"drop.num_layers={num_layers * known.units}")


def collect(options: Namespace, runs: dict[str, Path]) -> dict[str, Any]:
    """Figures of one model, from what the commands left.

    Args:
        options: of the command.
        runs: name -> folder, of `planned`.
    """
    rules = []
    for name in _RULES:
        if name in options.rules:
            rules.append({"rule": name, "healing": "distill", **_healed(runs[name], runs[name])})
    if options.qlora != "none":
        figures = _healed(runs["qlora"], runs[options.qlora])
        rules.append({"rule": options.qlora, "healing": "qlora", **figures})
    orders = [_ordered(runs, order, seed) for seed in options.seeds for order in _ORDERS]
    first = next(iter(runs.values()))
    dense = commands.scores_of(commands.results_of(first)["dense"])
    return {"dense": dense, "rules": rules, "orders": orders}


def _ordered(runs: dict[str, Path], order: str, seed: int) -> dict[str, Any]:
    """Scores at the end of one order, and the tokens it took in all."""
    run_dir, pruned = (runs[f"{name}-{seed}"] for name in (order, "pruned"))
    trained = [run_dir, pruned] if order == "last" else [run_dir]
    tokens = [commands.stage_metrics(one, "distill")["num_tokens"] for one in trained]
    return {
        "order": order, "seed": seed,
        "dropped": "" if order == "pruned" else _dropped(run_dir), "num_tokens": sum(tokens),
        **commands.scores_of(commands.results_of(run_dir)["recovered"]),
    }  # fmt: skip


def _dropped(run_dir: Path) -> str:
    """What a run dropped, in words."""
    found = commands.stage_metrics(run_dir, "drop")
    gone = found["dropped_layers"]
    words = "layer" if len(gone) == 1 else "layers"
    parts = [f"{words} {', '.join(map(str, gone))}"] if gone else []
    parts += [f"{one['part']} of {one['layer']}" for one in found["dropped_sublayers"]]
    return ", ".join(parts)


def _healed(run_dir: Path, source: Path) -> dict[str, Any]:
    """Scores before and after healing, of a run that healed what the source dropped."""
    results = commands.results_of(run_dir)
    stage, name = ("distill", "recovered") if run_dir == source else ("finetune", "finetuned")
    before, after = (commands.scores_of(results[key]) for key in ("dropped", name))
    metrics = commands.stage_metrics(run_dir, stage)
    return {
        "dropped": _dropped(source),
        "before": before,
        "after": after,
        "gap_healed": gap_recovered(
            after["perplexity"], results["dense"]["perplexity"], before["perplexity"]
        ),
        "num_tokens": metrics["num_tokens"],
        "seconds": metrics["num_tokens"] / metrics["tokens_per_s"],
    }


def tables_of(name: str, figures: dict[str, Any]) -> list[Table]:
    """The rules, and the orders with 2:4."""
    dense = figures["dense"]
    rules = [("dense", "", commands.number(dense["perplexity"], 3), "", "", "", "", "")]
    for row in figures["rules"]:
        title = _RULES[row["rule"]].title
        scores = [
            commands.number(row[when][key], decimals)
            for when in ("before", "after")
            for key, decimals in (("perplexity", 3), ("kl", 4))
        ]
        rules.append(
            (
                title if row["healing"] == "distill" else f"{title}, by QLoRA", row["dropped"],
                scores[0], scores[1], scores[2], scores[3], commands.percent(row["gap_healed"]),
                commands.number(row["seconds"], 0),
            )
        )  # fmt: skip
    headings = (
        name, "dropped", "perplexity", "KL", "healed", "healed KL", "gap healed", "seconds",
    )  # fmt: skip
    orders = [
        (
            f"{_ORDERS[row['order']]}, seed {row['seed']}", row["dropped"],
            commands.number(row["num_tokens"], 0), commands.number(row["perplexity"], 3),
            commands.number(row["kl"], 4), commands.percent(row["top1_agreement"]),
        )
        for row in figures["orders"]
    ]  # fmt: skip
    return [
        Table(headings, rules),
        Table((f"{name}, 2:4", "dropped", "tokens", "perplexity", "KL", "top-1"), orders),
    ]


def markdown(figures: dict[str, dict[str, Any]], command: str) -> str:
    """The tables of all models in Markdown, with the command that made them."""
    parts = [f"Made by\n\n```\n{command}\n```", "\n".join(f"- {note}" for note in _NOTES)]
    for name, found in figures.items():
        parts += [commands.markdown_table(table) for table in tables_of(name, found)]
    return "\n\n".join(parts)
