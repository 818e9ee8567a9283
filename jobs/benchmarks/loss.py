"""The loss from hidden states, compared with its matrix products alone and with full logits.

N tokens, V vocabulary, D hidden width.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from jobs.benchmarks.sides.loss import build, difference
from jobs.benchmarks.support.arguments import add_device, add_option, settings_of
from jobs.benchmarks.support.device import now_s, use_device
from jobs.benchmarks.support.record import Outcome, Table, Target, gigabytes
from sparsify.errors import TwofourError

SUMMARY = "the loss from hidden states compared with its matrix products and with full logits"

EXAMPLES = (
    "loss --threads 1",
    "loss --device cuda --dtype bfloat16 --vocabulary 128256 --width 4096 --chunk 1024",
)

_TARGET_RATIO = 1.15

_TARGET_GROWTH = 0.02

_GROWTH = 4

_SIDES = ("head", "products", "naive")

_TARGET_DIFFERENCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""of gradients that are rounded to these, made by one kernel or by PyTorch's operations"""

_NOTES = (
    "loss: forward KL with the gradients of hidden states and head, and the figures that come with "
    "it (reverse KL, agreement); products: the same matrix products on the same chunks and types, "
    "nothing else; full logits: autograd through the logits of all tokens",
    "without the kernel (GPU): the same loss by PyTorch's operations on whole chunks; difference: "
    "of the two ways' gradients, relative",
    "times are the fastest of the repeats, taken in turns; on a CPU they are seconds of work of "
    "all threads, which other programs disturb less; weights and hidden states are random",
    "memory: the most that one pass took on top of its inputs, each size in a process of its own",
    "growth: of the peak from N to 4 N tokens, as a share of what the logits of the further tokens "
    "take in float32; gradients of hidden states grow with N x D",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_device(parser)
    add_option(parser, "--tokens", 1024, "tokens of a pass whose time is taken")
    add_option(parser, "--vocabulary", 32000, "vocabulary of the timed pass")
    add_option(parser, "--width", 1024, "hidden width of both models in the timed pass")
    add_option(parser, "--chunk", 512, "tokens whose logits exist at one time")
    types = ["float32", "bfloat16"]
    add_option(parser, "--dtype", "float32", "of hidden states and weights", choices=types)
    add_option(parser, "--repeats", 3, "runs of the timed pass; the fastest counts")
    add_option(parser, "--memory-tokens", 512, "tokens of the smaller pass whose memory is taken")
    sizes = "vocabularies of the passes whose memory is taken"
    add_option(parser, "--memory-vocabularies", [32000, 128256], sizes, nargs="+", type=int)
    add_option(parser, "--memory-width", 256, "hidden width there")
    add_option(parser, "--memory-chunk", 128, "chunk there")


def run(options: Namespace) -> Outcome:
    """Time the three sides, and take the memory of two of them at growing sizes.

    Raises:
        InputError: there is no GPU.
    """
    num_threads = use_device(options)
    timed = settings_of(options, "tokens", "vocabulary", "width", "chunk", "dtype", "device")
    is_gpu = options.device == "cuda"
    apart = difference(**timed) if is_gpu else None
    seconds = fastest(timed, options.repeats, (*_SIDES, *(("operations",) if is_gpu else ())))
    memory = []
    for vocabulary in options.memory_vocabularies:
        for tokens in (options.memory_tokens, _GROWTH * options.memory_tokens):
            size = timed | {
                "tokens": tokens, "vocabulary": vocabulary, "width": options.memory_width,
                "chunk": options.memory_chunk,
            }  # fmt: skip
            print(f"memory: {tokens} tokens, vocabulary {vocabulary}", flush=True)
            row = {"tokens": tokens, "vocabulary": vocabulary}
            row |= {
                f"{side}_bytes": peak_bytes(size | {"side": side}) for side in ("head", "naive")
            }
            memory.append(row)
    settings = timed | settings_of(options, "repeats", "memory_width", "memory_chunk")
    return summarise(seconds, memory, settings, num_threads, apart)


def fastest(
    timed: dict[str, Any], repeats: int, sides: tuple[str, ...] = _SIDES
) -> dict[str, float]:
    """Least seconds of each side, the sides taking turns, after one turn that does not count."""
    steps, device = {side: build(side, **timed) for side in sides}, timed["device"]
    taken_s: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side in sides:
            started_s = now_s(device)
            steps[side]()
            one_s = now_s(device) - started_s
            if turn:
                taken_s[side].append(one_s)
                print(f"{side}: {one_s:.3f} s", flush=True)
    return {side: min(values) for side, values in taken_s.items()}


def peak_bytes(settings: dict[str, Any]) -> int:
    """Memory of one pass on top of its inputs, in a process of its own.

    Raises:
        TwofourError: the process failed; the message ends with its last line.
    """
    words = [sys.executable, "-m", "jobs.benchmarks.sides.loss", json.dumps(settings)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TwofourError(f"memory of {settings}: exit code {done.returncode}: {last}")
    return int(done.stdout)


def growth(memory: list[dict[str, Any]], side: str) -> float:
    """Largest growth of a side's peak with N, as a share of the further tokens' logits."""
    shares = []
    for small, large in zip(memory[::2], memory[1::2], strict=True):
        logits = 4 * large["vocabulary"] * (large["tokens"] - small["tokens"])
        shares.append((large[f"{side}_bytes"] - small[f"{side}_bytes"]) / logits)
    return max(shares)


def summarise(
    seconds: dict[str, float], memory: list[dict[str, Any]], settings: dict[str, Any],
    num_threads: int, apart: float | None = None,
) -> Outcome:  # fmt: skip
    """Two tables, and the promises: two, and on a GPU that the kernel is right and no slower."""
    ratio = seconds["head"] / seconds["products"]
    names = {
        "head": "loss", "products": "products alone", "naive": "full logits",
        "operations": "loss without its kernel",
    }  # fmt: skip
    times = Table(
        ("forward and backward", "time", "of products"),
        [
            (names[side], f"{value:.3f} s", f"{value / seconds['products']:.3f}")
            for side, value in seconds.items()
        ],
    )
    peaks = Table(
        ("tokens x vocabulary", "loss", "full logits", "one logits tensor"),
        [
            (
                f"{row['tokens']} x {row['vocabulary']}", gigabytes(row["head_bytes"]),
                gigabytes(row["naive_bytes"]), gigabytes(4 * row["tokens"] * row["vocabulary"]),
            )
            for row in memory
        ],
    )  # fmt: skip
    grown = growth(memory, "head")
    figures = {
        "seconds": seconds, "ratio": ratio, "memory": memory, "growth": grown,
        "growth_naive": growth(memory, "naive"),
    }  # fmt: skip
    targets = [
        Target.at_most("loss / products, time", _TARGET_RATIO, ratio),
        Target.at_most("growth of memory / logits", _TARGET_GROWTH, grown),
    ]
    if apart is not None:
        most, faster = (
            _TARGET_DIFFERENCE[settings["dtype"]],
            seconds["operations"] / seconds["head"],
        )
        figures |= {"difference": apart, "ratio_to_operations": faster}
        targets.append(Target.at_most("difference of the kernel's gradients", most, apart))
        targets.append(Target.at_least("time without the kernel / with it", 1.0, faster))
    device = settings["device"]
    return Outcome(device, num_threads, settings, figures, [times, peaks], targets, list(_NOTES))
