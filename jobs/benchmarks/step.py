"""One step of a recovery, compared with the arithmetic of its two models alone."""

from __future__ import annotations

import shutil
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from typing import Any

from jobs.benchmarks.sides.step import PHASES, Sides, build, process_group, require_engine
from jobs.benchmarks.support.arguments import add_device, add_option, add_shape, settings_of
from jobs.benchmarks.support.device import forget_peak, now_s, peak_bytes, use_device
from jobs.benchmarks.support.random_llama import check_blocks
from jobs.benchmarks.support.record import Outcome, Table, Target, accelerator_name, gigabytes
from sparsify.costs.flops import peak_flops
from sparsify.errors import InputError

SUMMARY = "a step of recovery compared with the arithmetic of its two models, and its parts"

EXAMPLES = (
    "step --threads 1 --save",
    "step --shape llama-3.1-8b --layers 4 --sequence-length 8192 --batch-size 4 "
    "--micro-batch-size 1 --device cuda --engine plain --compile --save",
)

_TARGET_RATIO = 1.10

_TARGET_MFU = 0.45

_NOTES = (
    "step: one optimizer step of the recovery's own loop on one process, as jobs.distill runs it "
    "(rows, teacher, student, KL from hidden states, gradient masks, clipping, AdamW, the guard's "
    "look at every copy), without checkpoints",
    "alone: the models' own code over the rows of the first step: the teacher's forward, the "
    "student's forward and backward, with the logits of all tokens and no loss, without an update; "
    "compiled and recomputed like the step's",
    "the two take turns in one run; the fastest of each counts; on a CPU times are seconds of work "
    "of all threads, which other programs disturb less",
    "tokens/s, TFLOP/s and MFU are means over all timed steps, by the clock",
    "parts of a step are means of further steps, in which a GPU is waited for at every part",
    "weights and tokens are random, masks 2:4 by size; FLOPs count causal attention within "
    "documents, and nothing that is recomputed",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_shape(parser, "bench-1k")
    add_option(parser, "--layers", 2, "decoder layers of both models")
    words = "vocabulary (default: 128256 of llama-3.1, else 8192)"
    add_option(parser, "--vocabulary", None, words, type=int)
    add_option(parser, "--sequence-length", 512, "tokens per row")
    add_option(parser, "--batch-size", 8, "rows per step")
    add_option(parser, "--micro-batch-size", 8, "rows per forward")
    whole = "each row is one document (else documents of 1000 tokens on average, kept apart)"
    parser.add_argument("--whole-rows", action="store_true", help=whole)
    add_device(parser)
    engine = "deepspeed, or plain: AdamW without it, where it is not installed"
    add_option(parser, "--engine", "deepspeed", engine, choices=["deepspeed", "plain"])
    stage = "ZeRO stage of --engine deepspeed (default: 2)"
    add_option(parser, "--zero-stage", None, stage, type=int, choices=[0, 1, 2, 3])
    precision = "arithmetic (default: bf16 on a GPU, fp32 on a CPU)"
    add_option(parser, "--precision", None, precision, choices=["fp32", "bf16"])
    types = ["float32", "bfloat16", "float8"]
    add_option(parser, "--teacher-dtype", None, "as distill.teacher_dtype", choices=types)
    parser.add_argument("--compile", action="store_true", help="as distill.compile")
    add_option(parser, "--recompute-share", 0.0, "as distill.recompute_share")
    whole, elementwise = "whole", "elementwise"
    add_option(parser, "--recompute", whole, "as distill.recompute", choices=[whole, elementwise])
    kinds = ["auto", "varlen", "masked"]
    add_option(parser, "--attention", "auto", "as distill.attention", choices=kinds)
    alone = "measure the models alone too; without it there is more memory for the step"
    parser.add_argument("--baseline", action=BooleanOptionalAction, default=True, help=alone)
    add_option(parser, "--warmup", 1, "steps that do not count")
    add_option(parser, "--steps", 3, "steps that are timed")
    add_option(parser, "--part-steps", 1, "further steps whose parts are timed")
    add_option(parser, "--seed", 0, "random weights and tokens")


def run(options: Namespace) -> Outcome:
    """Run the steps and the models alone in turns.

    Raises:
        InputError: options that do not go together, no GPU, or no DeepSpeed.
    """
    _check(options)
    num_threads = use_device(options)
    is_large = options.shape.startswith("llama-3.1")
    options.vocabulary = options.vocabulary or (128256 if is_large else 8192)
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    folder = options.workdir / "step"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    num_steps = options.warmup + options.steps + options.part_steps
    with process_group(options.device, folder):
        figures = measure(build(options, folder, num_steps, num_threads), options)
    shutil.rmtree(folder)
    settings = settings_of(
        options, "shape", "layers", "vocabulary", "sequence_length", "batch_size",
        "micro_batch_size", "whole_rows", "engine", "zero_stage", "precision", "teacher_dtype",
        "compile", "recompute_share", "recompute", "attention", "warmup", "steps", "part_steps",
        "seed",
    )  # fmt: skip
    if options.engine == "deepspeed" and options.zero_stage is None:
        settings["zero_stage"] = 2
    return summarise(figures, settings, options.device, num_threads)


def _check(options: Namespace) -> None:
    """Refuse options that cannot be run, before anything is made."""
    check_blocks(options.shape, options.layers, "--layers")
    if options.engine == "plain" and options.zero_stage is not None:
        raise InputError(
            f"--zero-stage {options.zero_stage} with --engine plain: without DeepSpeed nothing is "
            "split; leave one of them out"
        )
    for name in ("steps", "part_steps", "warmup", "batch_size", "micro_batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    if options.batch_size % options.micro_batch_size:
        raise InputError(
            f"--batch-size {options.batch_size}: not a multiple of --micro-batch-size "
            f"{options.micro_batch_size}"
        )
    require_engine(options.engine)


def measure(sides: Sides, options: Namespace) -> dict[str, Any]:
    """Seconds of every timed step and of every turn of the models alone, the parts, the memory."""
    clock = _Clock(sides, options)
    sides.context.on_step = clock.turn
    clock.begin()
    sides.recovery.train()
    recovery = sides.recovery
    recovery.pace.summary()
    found = {
        "step_s": clock.step_s, "step_wall_s": clock.step_wall_s, "alone_s": clock.alone_s,
        "parts_s": {
            name: seconds / options.part_steps for name, seconds in sides.watch.seconds.items()
        },
        "part_step_s": clock.part_step_s, "peak_bytes": clock.peak_bytes,
        "tokens": options.batch_size * options.sequence_length, "step_flops": clock.step_flops,
        "losses": [figures["loss"] for figures in recovery.curve],
        "num_parameters": sum(p.numel() for p in recovery.engine.module.parameters()),
    }  # fmt: skip
    if options.device == "cuda":
        found["peak_flops_per_s"] = peak_flops(accelerator_name())
    return found


class _Clock:
    """Takes the time between two steps of the recovery, and lets the models alone run there."""

    def __init__(self, sides: Sides, options: Namespace) -> None:
        self.step_s: list[float] = []
        self.step_wall_s: list[float] = []
        self.step_flops: list[float] = []
        self.part_step_s: list[float] = []
        self.alone_s: list[float] = []
        self.peak_bytes = 0
        self._sides, self._options = sides, options
        self._num_done = 0
        self._began_s = self._began_wall_s = 0.0

    def begin(self) -> None:
        """A step begins now."""
        self._began_s, self._began_wall_s = self._now_s(), time.perf_counter()

    def turn(self, values: dict[str, Any]) -> None:
        """A step is over: the models' turn, and the next step begins."""
        seconds = self._now_s() - self._began_s
        wall_s = time.perf_counter() - self._began_wall_s
        self.peak_bytes = max(self.peak_bytes, peak_bytes(self._options.device))
        watch, options = self._sides.watch, self._options
        self._num_done += 1
        is_warm = self._num_done > options.warmup
        is_watched = watch.is_on
        if is_watched:
            self.part_step_s.append(seconds)
        elif is_warm:
            self.step_s.append(seconds)
            self.step_wall_s.append(wall_s)
            self.step_flops.append(self._sides.recovery.step_flops)
        text = f"step {self._num_done}: {seconds:.3f} s, loss {values['distill/loss']:.5f}"
        if self._sides.plain is not None:
            alone_s = self._alone()
            if is_warm and not is_watched:
                self.alone_s.append(alone_s)
            text += f"; the models alone: {alone_s:.3f} s"
        print(text + ("" if is_warm else " (not counted)"), flush=True)
        watch.is_on = self._num_done >= options.warmup + options.steps
        forget_peak(self._options.device)
        self.begin()

    def _alone(self) -> float:
        assert self._sides.plain is not None
        started_s = self._now_s()
        self._sides.plain()
        return self._now_s() - started_s

    def _now_s(self) -> float:
        return now_s(self._options.device)


def summarise(
    figures: dict[str, Any], settings: dict[str, Any], device: str, num_threads: int
) -> Outcome:
    """Table of speed, table of parts, and the promise that the device is held to."""
    step_s, walls_s = min(figures["step_s"]), figures["step_wall_s"]
    figures["tokens_per_s"] = figures["tokens"] * len(walls_s) / sum(walls_s)
    figures["flops_per_s"] = sum(figures["step_flops"]) / sum(walls_s)
    rows = [
        ("parameters", f"{figures['num_parameters']:,}"),
        ("tokens per step", f"{figures['tokens']:,}"),
        ("step", f"{step_s:.3f} s"),
        ("tokens/s", f"{figures['tokens_per_s']:,.0f}"),
        ("TFLOP/s", f"{figures['flops_per_s'] / 1e12:.3f}"),
        ("peak memory", gigabytes(figures["peak_bytes"])),
    ]
    targets = []
    if figures.get("peak_flops_per_s"):
        figures["mfu"] = figures["flops_per_s"] / figures["peak_flops_per_s"]
        rows.append(("MFU", f"{figures['mfu']:.1%}"))
        targets.append(Target.at_least("MFU", _TARGET_MFU, figures["mfu"]))
    parts, whole_s = figures["parts_s"], sum(figures["part_step_s"]) / len(figures["part_step_s"])
    inside = {name: s for name, s in parts.items() if not name.startswith("alone: ")}
    inside["the rest"] = whole_s - sum(inside.values())
    parts["the rest"] = inside["the rest"]
    alone_s = None
    if figures["alone_s"]:
        alone_s = min(figures["alone_s"])
        figures["ratio"] = step_s / alone_s
        without_s = step_s - inside.get("optimizer", 0.0)
        figures["ratio_without_optimizer"] = without_s / alone_s
        rows += [
            ("the models alone", f"{alone_s:.3f} s"),
            ("step / alone", f"{figures['ratio']:.3f}"),
            ("the same without the optimizer", f"{figures['ratio_without_optimizer']:.3f}"),
        ]
        if device == "cpu":
            target = "step / student forward and backward and teacher forward"
            targets.append(Target.at_most(target, _TARGET_RATIO, figures["ratio"]))
    tables = [Table(("", "value"), rows), _parts_table(parts, inside, whole_s, alone_s)]
    return Outcome(device, num_threads, settings, figures, tables, targets, list(_NOTES))


def _parts_table(
    parts: dict[str, float], inside: dict[str, float], whole_s: float, alone_s: float | None
) -> Table:
    order = {name: number for number, name in enumerate(PHASES)}
    rows = []
    for name in sorted(inside, key=lambda name: order.get(name, len(order))):
        seconds = inside[name]
        alone = parts.get(f"alone: {name}")
        rows.append(
            (
                name, f"{1e3 * seconds:.1f} ms", f"{seconds / whole_s:.2%}",
                f"{seconds / alone_s:.4f}" if alone_s else "",
                f"{1e3 * alone:.1f} ms" if alone is not None else "",
            )
        )  # fmt: skip
    return Table(("part of a step", "time", "share", "of alone", "the models alone"), rows)
