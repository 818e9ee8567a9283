"""What a step of recovery would take on GPUs that are not there, and its share of their peak."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from typing import Any

from transformers import LlamaConfig

from jobs.benchmarks.support.arguments import add_option, settings_of
from jobs.benchmarks.support.op_costs import HOST_LINK
from jobs.benchmarks.support.random_llama import SHAPES, check_blocks, llama_config
from jobs.benchmarks.support.record import Outcome, Table, Target, gigabytes
from jobs.benchmarks.support.recovery_counts import (
    PHASES,
    Counted,
    count_step,
    document_lengths,
)
from jobs.benchmarks.support.stand_in_gpu import Spent
from sparsify.costs.cards import Card
from sparsify.costs.flops import distillation_flops, mfu
from sparsify.costs.layout import Training
from sparsify.costs.memory import training_memory
from sparsify.costs.seconds import Rates, step_seconds, total
from sparsify.costs.shapes import ModelShape, read_shape
from sparsify.errors import InputError

DEFAULTS = {
    "sequence_length": 8192, "document_length": 1000, "step_rows": 192, "micro_batch_size": 1,
    "recompute_share": 1.0, "recompute": "elementwise", "compile": True, "vocabulary": 128256,
}  # fmt: skip
"""options of this stage: those of conf/cluster/h100x8.yaml, with as many tokens a step in rows of
8,192"""

_GOAL_MFU = 0.5

_NOTES = (
    "the loop's own step is run on tensors without data, without and with a second micro-batch, "
    "whose share is added for each further one; every row is cut into the same documents",
    "an operation takes the longer of its arithmetic and its bytes; the host starts one launch "
    "after another, and a wait lets it catch up; shares of a card's data sheet as "
    "sparsify/costs/seconds.py has them, for attention backward and forward alike",
    "compiled blocks: AOTAutograd splits them and Inductor fuses them, and their kernels' bytes "
    "are Inductor's own count; what Dynamo's guards take of the host is not in it",
    "DeepSpeed and FSDP are not run: their passes over memory and what they send are written down "
    "in support/stand_in_zero.py; gradients cross links beside the backward pass, and their passes "
    "over memory are between its kernels; a ring's latency is not in it",
    "MFU as training reports it: operations that the two models ask for (sparsify/costs/flops.py), "
    "by the peak of the data sheet; what is recomputed is time and no operations",
    "reading rows hides behind the steps; a checkpoint's copy to host memory does not, and is not "
    "in a step",
)


def add_recovery(parser: ArgumentParser) -> None:
    """Options of `--stage recovery`."""
    group: Any = parser.add_argument_group("of --stage recovery")
    add_option(group, "--sequence-length", DEFAULTS["sequence_length"], "tokens per row")
    add_option(group, "--document-length", DEFAULTS["document_length"], "tokens per document")
    add_option(group, "--step-rows", DEFAULTS["step_rows"], "rows per step of all GPUs together")
    add_option(group, "--micro-batch-size", DEFAULTS["micro_batch_size"], "rows per forward")
    add_option(group, "--recompute-share", DEFAULTS["recompute_share"], "as distill's")
    kinds = ["whole", "elementwise"]
    add_option(group, "--recompute", DEFAULTS["recompute"], "as distill's", choices=kinds)
    add_option(group, "--vocabulary", DEFAULTS["vocabulary"], "tokens of the vocabulary")
    group.add_argument(
        "--compile", action=BooleanOptionalAction, default=DEFAULTS["compile"],
        help="as distill.compile (default: yes)",
    )  # fmt: skip


def run(options: Namespace, card: Card, rates: Rates, num_threads: int) -> Outcome:
    """Count a step, and work out its speed.

    Raises:
        InputError: options that do not go together.
        TwofourError: see `stand_in_gpu`.
    """
    num_parts = _check(options, card)
    num_blocks = check_blocks(options.shape, SHAPES[options.shape]["num_hidden_layers"], "--blocks")
    config = llama_config(options.shape, num_blocks, options.sequence_length, options.vocabulary)
    print(f"a step of {options.shape}, counted for {options.gpus} {options.card}", flush=True)
    counted = count_step(config, options, card, rates, num_parts)
    figures = _figures(config, options, card, rates, num_parts, counted)
    targets = []
    is_target = all(
        getattr(options, name) == DEFAULTS[name] for name in ("sequence_length", "vocabulary")
    )
    if is_target and (options.shape, options.card) == ("llama-3.1-8b", "h100"):
        targets.append(Target.at_least("MFU", _GOAL_MFU, figures["mfu"]))
    return Outcome(
        options.device, num_threads,
        settings_of(options, "stage", "shape", "card", "gpus", *DEFAULTS), figures,
        [_phase_table(counted), _kernel_table(counted), _speed_table(figures, options.gpus)],
        targets, list(_NOTES),
        summary={"mfu": round(figures["mfu"], 3), "step_s": round(figures["step_s"], 2)},
    )  # fmt: skip


def _check(options: Namespace, card: Card) -> int:
    """Micro-batches of a GPU in a step."""
    check_blocks(options.shape, 1, "--blocks")
    if options.device == "cuda":
        raise InputError(
            "--device cuda with --stage recovery: a step is measured by jobs.bench step"
        )
    for name in (name for name, value in DEFAULTS.items() if type(value) is int):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    if not 0 <= options.recompute_share <= 1:
        raise InputError(f"--recompute-share {options.recompute_share}: 0 to 1")
    if options.gpus > card.gpus_per_node and options.gpus % card.gpus_per_node:
        raise InputError(
            f"--gpus {options.gpus}: whole machines of {card.gpus_per_node}, or GPUs of one"
        )
    unit = options.gpus * options.micro_batch_size
    if options.step_rows % unit:
        raise InputError(
            f"--step-rows {options.step_rows}: not a multiple of {unit}, --gpus times "
            "--micro-batch-size"
        )
    return int(options.step_rows // unit)


def _figures(
    config: LlamaConfig, options: Namespace, card: Card, rates: Rates, num_parts: int,
    counted: Counted,
) -> dict[str, Any]:  # fmt: skip
    """What is kept of a step: seconds, speed, memory, and the plan's figures beside them."""
    shape = read_shape(config)
    step = counted.step
    tokens = num_parts * options.micro_batch_size * options.sequence_length
    lengths = document_lengths(options.sequence_length, options.document_length)
    per_token = distillation_flops(shape.flops, shape.flops, lengths) / options.sequence_length
    peak = card.flops["bf16"]
    layout = _layout(options, card, num_parts)
    planned_s = total(step_seconds(shape, shape, layout, rates, options.document_length))
    return {
        "phases": counted.phases, "step": step, "step_s": step["s"], "tokens": tokens,
        "tokens_per_s": tokens / step["s"], "flops_per_token": per_token,
        "mfu": mfu(tokens / step["s"], per_token, peak),
        "operations": {"counted": products(step), "asked": per_token * tokens},
        "kernels": counted.kernels, "memory": _memory(shape, layout, card),
        "checkpoint_s": 12.0 * shape.num_parameters / options.gpus / HOST_LINK,
        "plan": {"step_s": planned_s, "mfu": mfu(tokens / planned_s, per_token, peak)},
    }  # fmt: skip


def _layout(options: Namespace, card: Card, num_parts: int) -> Training:
    return Training(
        world_size=options.gpus, gpus_per_node=min(options.gpus, card.gpus_per_node),
        micro_batch_size=options.micro_batch_size, sequence_length=options.sequence_length,
        num_micro_batches=num_parts, recompute_share=options.recompute_share,
        recompute=options.recompute, compile=options.compile,
        teacher_placement="node" if options.gpus > 1 else "replicated",
    )  # fmt: skip


def _memory(shape: ModelShape, layout: Training, card: Card) -> dict[str, float]:
    """Bytes that the plan reckons with, and that the card has."""
    return {"needed": training_memory(shape, shape, layout).total, "there": card.memory_bytes}


def products(spent: Spent) -> float:
    """Operations of matrix products and of attention."""
    kinds = ("half", "float32", "attention")
    return sum(spent.get(f"operations:{kind}", 0.0) for kind in kinds)


def _phase_table(counted: Counted) -> Table:
    step = counted.step
    rows = [
        (
            name, f"{spent.get('s', 0.0):.3f} s", f"{spent.get('s', 0.0) / step['s']:.1%}",
            spent.bound, f"{products(spent) / 1e12:.1f}", f"{spent.get('bytes', 0.0) / 1e9:.1f}",
            f"{spent.get('exchanged bytes', 0.0) / 1e9:.1f}", f"{spent.get('s:links', 0.0):.3f} s",
            f"{spent.get('launches', 0.0):.0f}", f"{spent.get('waits', 0.0):.0f}",
        )
        for name, spent in [*((name, counted.phases[name]) for name in PHASES), ("all", step)]
    ]  # fmt: skip
    head = ("phase of a step", "time", "share", "bound by", "TFLOP", "GB", "GB sent", "links",
            "launches", "waits")  # fmt: skip
    return Table(head, rows)


def _kernel_table(counted: Counted) -> Table:
    most = sorted(counted.kernels.items(), key=lambda one: -one[1][1])[:12]
    rows = [(name, f"{seconds:.3f} s", f"{times:.0f}") for name, (times, seconds) in most]
    return Table(("operation or kernel", "s of a step", "launches of a step"), rows)


def _speed_table(figures: dict[str, Any], gpus: int) -> Table:
    memory, operations = figures["memory"], figures["operations"]
    sizes = f"{gigabytes(memory['needed'])} of {gigabytes(memory['there'])}"
    fits = memory["needed"] <= memory["there"]
    rows = [
        ("step", f"{figures['step_s']:.2f} s"),
        ("tokens/s of a GPU", f"{figures['tokens_per_s']:,.0f}"),
        ("operations counted / asked for", f"{operations['counted'] / operations['asked']:.3f}"),
        ("MFU", f"{figures['mfu']:.1%}"),
        ("MFU by the arithmetic of jobs.plan", f"{figures['plan']['mfu']:.1%}"),
        ("memory by jobs.plan", sizes if fits else f"{sizes}: it does not fit"),
        ("a checkpoint's copy to the host", f"{figures['checkpoint_s']:.2f} s"),
    ]
    return Table((f"{gpus} GPUs", "value"), rows)
