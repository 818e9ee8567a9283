"""A model's pruning from a few of its blocks: times by phase, beside what arithmetic alone takes.

A folder of random weights is pruned as `jobs.prune` prunes one: block by block from its files, with
checkpoints, into files. Needs torch, transformers and safetensors, and nothing else, so that it
runs on a bare machine.
T stands for tokens, I for the input features of a layer, O for its rows.
"""

from __future__ import annotations

import itertools
import shutil
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from cluster.machine import peak_memory_bytes
from jobs.benchmarks.support.arguments import (
    add_calibration,
    add_device,
    add_option,
    add_shape,
    settings_of,
)
from jobs.benchmarks.support.device import forget_peak, peak_bytes, use_device, wall_s
from jobs.benchmarks.support.random_llama import (
    block_num_weights,
    check_blocks,
    linear_shapes,
    llama_config,
    random_rows,
    write_checkpoint,
)
from jobs.benchmarks.support.record import Outcome, Table, Target, gigabytes
from jobs.benchmarks.support.stopwatch import mean_phases, phase_seconds
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.methods import PruneParams, get_method
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, prune_checkpoint

SUMMARY = "a whole model's time and memory from some of its blocks, phase by phase"

EXAMPLES = ("model --shape llama-3.1-8b --blocks 3 --device cuda",)

_VOCABULARY = 4096

_NOTES = (
    "random weights and tokens: what the work costs, nothing about quality",
    f"the vocabulary is cut to {_VOCABULARY} tokens, which pruning does not touch",
    "files lie in the page cache when they are read, and are written to --workdir's disk",
    "limits: forward 2 T weights + causal attention, once for the statistics and once to move on; "
    "statistics also T I^2 per distinct input (half of a symmetric product); factor 2/3 I^3 per "
    "distinct input; solve O I^2 per layer (the sweep)",
    "rates are those of a large matrix product measured on the same device: the model's dtype for "
    "forward and statistics, float32 without TF32 for factor and solve",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_shape(parser, "llama-3.1-8b")
    add_option(parser, "--blocks", 3, "blocks that are measured")
    add_calibration(parser, samples=512, length=2048, batch_size=8)
    document = "tokens of a document; 0: every row is one"
    add_option(parser, "--document-length", 0, document)
    add_option(parser, "--method", "sparsegpt", "method")
    orders = ["auto", "layer", "block", "dense"]
    add_option(parser, "--order", "auto", "prune.order", choices=orders)
    add_device(parser, "cuda")
    dtype = "of the weights (default: bfloat16 on a GPU, float32 on a CPU)"
    add_option(parser, "--dtype", None, dtype, choices=["bfloat16", "float16", "float32"])
    overlap = "prune the same model again with prune.overlap=true, and hold both against each other"
    parser.add_argument("--overlap", action="store_true", help=overlap)


def run(options: Namespace) -> Outcome:
    """Prune a model of `--blocks` blocks and work out the whole one.

    Leaves the dense folder in `--workdir`.

    Raises:
        InputError: an unknown shape, more blocks than it has, or no GPU.
    """
    num_blocks = check_blocks(options.shape, options.blocks, "--blocks")
    if options.document_length < 0:
        raise InputError(
            f"--document-length {options.document_length}: give tokens, or 0 for rows of one "
            "document"
        )
    num_threads = use_device(options)
    dtype_name = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    dtype = getattr(torch, dtype_name)
    config = llama_config(options.shape, options.blocks, options.length, _VOCABULARY)

    dense = options.workdir / f"model-{options.shape}-{options.blocks}-{dtype_name}"
    write_checkpoint(dense, config, options.seed, dtype)
    rows = random_rows(options.samples, options.length, _VOCABULARY, options.seed)
    if options.document_length:
        rows.positions_NT.remainder_(options.document_length)

    def measured(overlap: bool) -> dict[str, Any]:
        ahead = ", working ahead" if overlap else ""
        print(f"{options.blocks} blocks of {options.shape} on {options.device}{ahead}", flush=True)
        return measure(dense, dtype_name, rows, options, overlap)

    figures = measured(overlap=False)
    if options.overlap:
        figures["overlap"] = compared(figures, measured(overlap=True))
    bits = torch.finfo(dtype).bits // 8
    figures["block_bytes"] = bits * block_num_weights(config)
    rates = {
        "model": gemm_rate(dtype, options.device),
        "float32": gemm_rate(torch.float32, options.device),
    }
    figures["flops_per_s"] = rates
    figures["limits_s"] = limits(config, options.samples, options.length, rates)
    figures["whole_model"] = extrapolate(figures, num_blocks)
    settings = settings_of(
        options, "shape", "blocks", "samples", "length", "batch_size", "method", "order", "seed",
        "document_length", "overlap",
    ) | {"dtype": dtype_name}  # fmt: skip
    return summarise(figures, settings, options.device, num_threads)


def measure(
    dense: Path, dtype: str, rows: TokenRows, options: Namespace, overlap: bool
) -> dict[str, Any]:
    """Prune the folder; seconds of every block and phase, peak memory, and the masks' digests."""
    device, out = options.device, dense.with_name(f"{dense.name}-pruned")
    shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
    forget_peak(device)
    before_bytes = torch.cuda.memory_allocated() if device == "cuda" else peak_memory_bytes()
    marks = [wall_s(device)]
    result = prune_checkpoint(
        dense, out, rows, get_method(options.method), Pattern.parse("2:4"), PruneParams(),
        comm=Comm.single(),
        memory=Memory(options.batch_size, dtype, options.device, overlap=overlap),
        layers=LayerChoice(order=None if options.order == "auto" else options.order),
        clock=time.perf_counter, on_block=lambda done, total: marks.append(wall_s(device)),
    )  # fmt: skip
    end_s = wall_s(device)
    shutil.rmtree(out)
    return {
        "total_s": end_s - marks[0],
        "block_s": [stop - start for start, stop in itertools.pairwise(marks)],
        "block_phases_s": [
            phase_seconds(layer for layer in result.layers if layer.block == index)
            for index in range(options.blocks)
        ],
        "peak_bytes": peak_bytes(device),
        "before_bytes": before_bytes,
        "keep_mask_sha256": {layer.name: layer.keep_mask_sha256 for layer in result.layers},
    }


def compared(plain: dict[str, Any], ahead: dict[str, Any]) -> dict[str, Any]:
    """What working ahead changed: seconds, memory, and how many layers have the same mask."""
    masks = plain["keep_mask_sha256"]
    others = ahead["keep_mask_sha256"]
    # Of blocks after the first, for which alone kernels are compiled and recorded.
    typical = typical_blocks(len(plain["block_s"]))
    plain_s, ahead_s = (sum(found["block_s"][typical]) for found in (plain, ahead))
    return {
        **ahead,
        "time_ratio": ahead_s / plain_s,
        "num_layers": len(masks),
        "num_equal_masks": sum(masks[name] == others[name] for name in masks),
    }


def limits(
    config: LlamaConfig, num_rows: int, length: int, rates: dict[str, float]
) -> dict[str, float]:
    """Seconds that one block's arithmetic takes at the given rates, by phase.

    Args:
        config: shape of the model.
        num_rows, length: calibration rows and their tokens.
        rates: operations per second: "model" in the model's dtype, "float32".
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    layers = linear_shapes(config)
    inputs = [hidden, hidden, hidden, inner]  # q k v | o | gate up | down
    num_tokens = num_rows * length
    forward = 2 * num_tokens * sum(rows * columns for rows, columns in layers)
    # Half of the score matrix is masked: T/2 keys on average, two products, two operations each.
    forward += 2 * num_tokens * length * hidden
    hessians = num_tokens * sum(columns**2 for columns in inputs)
    return {
        "statistics": (forward + hessians) / rates["model"],
        "factor": 2 / 3 * sum(columns**3 for columns in inputs) / rates["float32"],
        "solve": sum(rows * columns**2 for rows, columns in layers) / rates["float32"],
        "forward": forward / rates["model"],
    }


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """Operations per second of a square matrix product, the best of five."""
    size = 8192 if device == "cuda" else 1024
    first = torch.randn(size, size, device=device).to(dtype)
    second = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(6):
        started_s = wall_s(device)
        first @ second
        times.append(wall_s(device) - started_s)
    return 2 * size**3 / min(times[1:])


def typical_blocks(num_measured: int) -> slice:
    """The measured blocks that stand for those that were not.

    The first block also pays for warming up, and the last one is not run again after it is pruned,
    because no block follows; with fewer than three the first has to do.
    """
    return slice(1, num_measured - 1) if num_measured > 2 else slice(0, 1)


def extrapolate(figures: dict[str, Any], num_blocks: int) -> dict[str, Any]:
    """Time of the whole model: what was measured, and the mean of typical blocks for the rest."""
    num_measured = len(figures["block_s"])
    typical = figures["block_s"][typical_blocks(num_measured)]
    mean_s = sum(typical) / len(typical)
    total_s = figures["total_s"] + (num_blocks - num_measured) * mean_s
    return {
        "num_blocks": num_blocks,
        "mean_block_s": mean_s,
        "total_s": total_s,
        "limit_s": num_blocks * sum(figures["limits_s"].values()),
        "weights_bytes": num_blocks * figures["block_bytes"],
        "working": f"{figures['total_s']:.3f} s for {num_measured} blocks + "
        f"{num_blocks - num_measured} x {mean_s:.3f} s = {total_s:.1f} s",
    }


def summarise(
    figures: dict[str, Any], settings: dict[str, Any], device: str, num_threads: int
) -> Outcome:
    """Tables of the phases of a block and of the whole model."""
    typical = figures["block_phases_s"][typical_blocks(settings["blocks"])]
    means = mean_phases(typical)
    rows = []
    for name in sorted(means, key=means.__getitem__, reverse=True):
        limit_s = figures["limits_s"].get(name)
        rows.append(
            (
                name,
                f"{means[name]:.3f} s",
                f"{limit_s:.3f} s" if limit_s else "",
                f"{limit_s / means[name]:.3f}" if limit_s and means[name] else "",
            )
        )
    whole = figures["whole_model"]
    model_rows = [
        ("measured blocks", str(settings["blocks"])),
        ("measured time", f"{figures['total_s']:.2f} s"),
        (f"whole model ({whole['num_blocks']} blocks)", f"{whole['total_s']:.1f} s"),
        ("its arithmetic", f"{whole['limit_s']:.1f} s"),
        ("peak memory", gigabytes(figures["peak_bytes"])),
        ("weights of all blocks", gigabytes(whole["weights_bytes"])),
    ]
    tables = [
        Table(("phase of a block", "measured", "limit", "limit / measured"), rows),
        Table(("", "value"), model_rows),
    ]
    targets = []
    if "overlap" in figures:
        ahead = figures["overlap"]
        ahead_rows = [("time", f"{figures['total_s']:.2f} s", f"{ahead['total_s']:.2f} s")]
        if device == "cuda":  # a process on a CPU has one peak for both
            peaks = gigabytes(figures["peak_bytes"]), gigabytes(ahead["peak_bytes"])
            ahead_rows.append(("peak memory", *peaks))
        tables.append(Table(("measured blocks", "prune.overlap=false", "true"), ahead_rows))
        equal = ahead["num_equal_masks"] / ahead["num_layers"]
        targets = [
            Target.at_least("share of layers with the same mask, working ahead", 1.0, equal),
            Target.at_most("time of a block, working ahead over not", 1.0, ahead["time_ratio"]),
        ]
    notes = [*_NOTES, f"whole model: {whole['working']}"]
    return Outcome(device, num_threads, settings, figures, tables, targets, notes)
