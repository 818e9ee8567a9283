"""One training budget spent three ways: a large model, a large one pruned, a small one for longer.

All are trained from random weights on the same text with the same vocabulary, by the ordinary
commands, for equally many floating point operations: the large dense model; a large dense model
trained for less, pruned to 2:4 and recovered with what is left (the teacher's forward passes are
counted); and a small dense model that takes as many bytes in bfloat16 as the pruned one packed,
trained for longer.
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from conf.options.pretrain import PretrainConfig
from jobs.benchmarks.support import commands
from jobs.benchmarks.support.arguments import add_option, add_set, settings_of
from jobs.benchmarks.support.record import Outcome, Table
from jobs.workers.pretrain_inputs import config_of
from sparsify.costs.deploy import deployed_sizes
from sparsify.costs.flops import ModelFlops, count_flops, distillation_flops
from sparsify.costs.scaling import LAWS
from sparsify.costs.shapes import read_shape
from sparsify.errors import InputError
from sparsify.models.load import model_of

SUMMARY = "train small for longer, or prune a large model: equal compute, equal bytes"

EXAMPLES = ("budget --save", "budget --tokens 300_000 --seeds 1")

_NOTES = (
    "perplexity per token on held-out text; the mean of all seeds, and the largest less the least",
    "operations: of training, 3 forward passes a token, and in a recovery one of the teacher more; "
    "every row counts as one document; calibration and pruning are not counted",
    "bytes: of the weights in bfloat16, pruned layers packed 2:4; the small model is as deep as "
    "the large one, and its bytes are the nearest to those of the pruned one",
    "law: loss in nats that two published scaling laws, those of jobs.plan, give a dense model of "
    "these sizes; they are of web text and other tokenizers: only differences between rows count",
    "each side has the rates of its command's defaults, warmed up over a tenth of its steps and "
    "then decayed over the others; every step has 16 rows",
)


_BATCH_SIZE = 16


@dataclass(frozen=True)
class Size:
    """A dense model of given sizes, and what it takes."""

    width: int
    feed_forward: int
    num_layers: int
    vocab_size: int
    length: int

    def words(self) -> list[str]:
        """The same as options of jobs.pretrain."""
        return [
            f"pretrain.hidden_size={self.width}", f"pretrain.intermediate_size={self.feed_forward}",
            f"pretrain.num_layers={self.num_layers}", f"pretrain.vocab_size={self.vocab_size}",
        ]  # fmt: skip

    def _config(self) -> Any:
        settings = PretrainConfig(
            hidden_size=self.width, intermediate_size=self.feed_forward,
            num_layers=self.num_layers, vocab_size=self.vocab_size,
        )  # fmt: skip
        return config_of(settings, self.length, None)

    @cache  # noqa: B019 - a handful of sizes in a process, each of which is traced once
    def flops(self) -> ModelFlops:
        """What a forward pass multiplies."""
        with torch.device("meta"):
            return count_flops(model_of(self._config(), "budget"))

    @cache  # noqa: B019
    def facts(self) -> dict[str, int]:
        """Parameters, and bytes in bfloat16: dense, and packed 2:4."""
        shape = read_shape(self._config())
        sizes = {size.is_packed: size for size in deployed_sizes(shape) if size.format == "bf16"}
        return {
            "num_parameters": shape.num_parameters,
            "dense_bytes": round(sizes[False].weight_bytes),
            "packed_bytes": round(sizes[True].weight_bytes),
        }


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_option(parser, "--source", "stdlib", "text, as in data.calibration of jobs.pretrain")
    add_option(parser, "--width", 96, "width of the large model; a multiple of 8")
    add_option(parser, "--feed-forward", 256, "width of its feed-forward part")
    add_option(parser, "--layers", 4, "decoder blocks of both models")
    add_option(parser, "--vocabulary", 512, "tokens of the vocabulary that all sides share")
    add_option(parser, "--length", 256, "tokens per row")
    add_option(parser, "--tokens", 1_000_000, "tokens of the large dense model: the budget")
    share = "of the budget, what the recovery takes of the model that is pruned"
    add_option(parser, "--recovery-share", 0.2, share)
    add_option(parser, "--method", "sparsegpt", "pruning method")
    add_option(parser, "--seeds", 2, "trainings of each side, with seeds 0, 1, ...")
    add_set(parser, "every command")


@dataclass(frozen=True)
class Plan:
    """Sizes and tokens of all sides, for one budget."""

    large: Size
    small: Size
    num_tokens: int
    """of the large dense model"""
    short_tokens: int
    """of the one that is pruned"""
    recovery_tokens: int
    small_tokens: int

    def flops(self) -> dict[str, float]:
        """Operations of the training of each side."""
        large = self.large.flops()
        recovery = self.recovery_tokens * _token_flops(large, large, self.large.length)
        short = self.short_tokens * _token_flops(large, None, self.large.length)
        return {
            "large": self.num_tokens * _token_flops(large, None, self.large.length),
            "short": short,
            "pruned": short,
            "recovered": short + recovery,
            "small": self.small_tokens * _token_flops(self.small.flops(), None, self.small.length),
        }


def _token_flops(student: ModelFlops, teacher: ModelFlops | None, length: int) -> float:
    return distillation_flops(student, teacher, [length]) / length


def make_plan(options: Namespace, step_tokens: int) -> Plan:
    """Spend the budget of --tokens three ways.

    Args:
        options: of the command.
        step_tokens: tokens of an optimizer step of any side, whole multiples of which are trained.

    Raises:
        InputError: sizes that no model has; or less than a step for a side.
    """
    large = Size(
        options.width, options.feed_forward, options.layers, options.vocabulary, options.length
    )
    small, counts = nearest_small(large), large.flops()
    own = _token_flops(counts, None, large.length)
    num_tokens = options.tokens // step_tokens * step_tokens
    budget = num_tokens * own

    def steps(flops: float, per_token: float) -> int:
        return round(flops / per_token / step_tokens) * step_tokens

    teaching = _token_flops(counts, counts, large.length)
    recovery = steps(options.recovery_share * budget, teaching)
    short = steps(budget - recovery * teaching, own)
    longer = steps(budget, _token_flops(small.flops(), None, small.length))
    if min(num_tokens, recovery, short) < step_tokens:
        raise InputError(
            f"--tokens {options.tokens} --recovery-share {options.recovery_share:g}: less than a "
            f"step of {step_tokens} tokens for a side; give more tokens, or another share"
        )
    return Plan(large, small, num_tokens, short, recovery, longer)


def nearest_small(large: Size) -> Size:
    """The model as deep as `large` whose bytes in bfloat16 are nearest to those of it packed.

    Raises:
        InputError: `large` has no smaller one.
    """
    wanted = large.facts()["packed_bytes"]
    found = [
        Size(width, feed_forward, large.num_layers, large.vocab_size, large.length)
        for width in range(8, large.width, 8)
        # About as much of it in the feed-forward part as in the large model.
        for feed_forward in (round(large.feed_forward * width / large.width / 8) * 8,)
        if feed_forward
    ]
    if not found:
        raise InputError(f"--width {large.width}: there is no smaller model; use at least 16")
    return min(found, key=lambda size: abs(size.facts()["dense_bytes"] - wanted))


def run(options: Namespace) -> Outcome:
    """Run the commands (finished stages are reused), collect their figures.

    Raises:
        InputError: sizes or a budget that cannot be.
        TwofourError: a command failed; its log is named.
    """
    plan = make_plan(options, _BATCH_SIZE * options.length)
    folder = options.workdir / "budget"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "large-seed0" / "pretrain" / "model"
    scores: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for side, size, tokens in (
            ("large", plan.large, plan.num_tokens), ("short", plan.large, plan.short_tokens),
            ("small", plan.small, plan.small_tokens),
        ):  # fmt: skip
            target = folder / f"{side}-seed{seed}"
            commands.run_command(pretrain_words(options, size, tokens, seed, target, tokenizer))
            found = commands.results_of(target)["dense"]["perplexity"]
            scores.setdefault(side, []).append(found)
        target = folder / f"pruned-seed{seed}"
        start = folder / f"short-seed{seed}" / "pretrain" / "model"
        commands.run_command(recover_words(options, plan, seed, start, target))
        results = commands.results_of(target)
        scores.setdefault("pruned", []).append(results[options.method]["perplexity"])
        scores.setdefault("recovered", []).append(results["recovered"]["perplexity"])
    figures = figures_of(plan, scores)
    facts = commands.summary_of(folder / "large-seed0")["run"]
    settings = settings_of(
        options, "source", "width", "feed_forward", "layers", "vocabulary", "length", "tokens",
        "recovery_share", "method", "seeds", "set",
    )  # fmt: skip
    settings["num_workers"] = facts["num_workers"]
    best = min(("large", "recovered", "small"), key=lambda side: figures[side]["perplexity"])
    summary = {side: figures[side]["perplexity"] for side in figures} | {"best": best}
    return Outcome(
        facts["device"], 1, settings, figures, [table_of(figures)], [], list(_NOTES),
        summary=summary,
    )  # fmt: skip


def _common(options: Namespace, seed: int, target: Path) -> list[str]:
    return [
        f"data.calibration={options.source}", f"data.sequence_length={options.length}",
        f"run.seed={seed}", f"run.dir={target}", "cluster.executor=plain", "tracker.wandb=off",
        *options.set,
    ]  # fmt: skip


def _schedule(options: Namespace, stage: str, tokens: int) -> list[str]:
    num_warmup_steps = tokens // (_BATCH_SIZE * options.length) // 10
    return [
        f"{stage}.num_tokens={tokens}", f"{stage}.batch_size={_BATCH_SIZE}",
        f"{stage}.num_warmup_steps={num_warmup_steps}",
    ]  # fmt: skip


def pretrain_words(
    options: Namespace, size: Size, tokens: int, seed: int, target: Path, tokenizer: Path
) -> list[str]:
    """The words of the command that trains a model; all but the first run have its tokenizer."""
    own = target / "pretrain" / "model" == tokenizer
    return [
        "jobs.pretrain", *size.words(), *_schedule(options, "pretrain", tokens),
        *([] if own else [f"pretrain.tokenizer={tokenizer}"]), *_common(options, seed, target),
    ]  # fmt: skip


def recover_words(
    options: Namespace, plan: Plan, seed: int, start: Path, target: Path
) -> list[str]:
    """The words of the command that prunes, recovers and evaluates."""
    return [
        "jobs.prune", "stages=[prune,distill,evaluate]", f"model.path={start}",
        f"prune.method={options.method}", "prune.baselines=[]",
        *_schedule(options, "distill", plan.recovery_tokens), *_common(options, seed, target),
    ]  # fmt: skip


_TITLES = {
    "large": "dense large",
    "short": "dense large, for less",
    "pruned": "  pruned to 2:4",
    "recovered": "  and recovered",
    "small": "dense small, for longer",
}
"""side -> row of the table, in its order"""


def figures_of(plan: Plan, scores: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """What each side takes, how good it is, and what scaling laws say of dense ones."""
    large, small, flops = plan.large.facts(), plan.small.facts(), plan.flops()
    tokens = {
        "large": plan.num_tokens, "short": plan.short_tokens, "pruned": plan.short_tokens,
        "recovered": plan.short_tokens + plan.recovery_tokens, "small": plan.small_tokens,
    }  # fmt: skip
    found = {}
    for side in _TITLES:
        facts, is_pruned = small if side == "small" else large, side in ("pruned", "recovered")
        count = facts["num_parameters"]
        found[side] = {
            "num_parameters": count,
            "deployed_bytes": facts["packed_bytes" if is_pruned else "dense_bytes"],
            "num_tokens": tokens[side],
            "training_flops": flops[side],
            "perplexities": scores[side],
            "perplexity": statistics.fmean(scores[side]),
            "spread": max(scores[side]) - min(scores[side]),
            "laws": {law.name: law.loss(count, tokens[side]) for law in LAWS if not is_pruned},
        }
    return found


def table_of(figures: dict[str, dict[str, Any]]) -> Table:
    """One row for each side."""
    rows = [
        (
            _TITLES[side],
            f"{row['num_parameters']:,}",
            f"{row['deployed_bytes'] / 1e3:,.0f} kB",
            f"{row['num_tokens'] / 1e6:,.2f} M",
            f"{row['training_flops'] / 1e12:,.2f} T",
            commands.number(row["perplexity"], 3),
            commands.number(row["spread"] if len(row["perplexities"]) > 1 else None, 3),
            *(commands.number(row["laws"].get(law.name), 3) for law in LAWS),
        )
        for side, row in figures.items()
    ]
    headings = (
        "side", "parameters", "bytes", "tokens", "operations", "perplexity", "spread",
        *(f"law, {law.name}" for law in LAWS),
    )  # fmt: skip
    return Table(headings, rows)
