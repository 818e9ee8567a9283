"""Pruning compared with llm-compressor: the same model, rows, CPU and threads, on either side."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from conf.options.data import DataConfig
from jobs.benchmarks.support.arguments import (
    add_calibration,
    add_option,
    add_threads,
    settings_of,
)
from jobs.benchmarks.support.environment import (
    LLMCOMPRESSOR,
    installed_versions,
    llmcompressor_python,
)
from jobs.benchmarks.support.layer_error import judge, mask_agreement
from jobs.benchmarks.support.processes import run_logged
from jobs.benchmarks.support.random_llama import llama_config, random_rows, write_checkpoint
from jobs.benchmarks.support.record import Outcome, Table, Target, gigabytes, num_cpus
from jobs.corpus.rows import load_rows
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError, TwofourError
from sparsify.files import resolve_path
from sparsify.models.load import load_tokenizer

SUMMARY = "pruning compared with llm-compressor: time, memory, layer errors"

EXAMPLES = (
    "prune --against llmcompressor --threads 1",
    "prune --against llmcompressor --model embedded",
)

_SIDES = ("twofour", "llmcompressor")

_SHAPE = "bench-1k"

_VOCABULARY = 4096

# Both sides follow the same algorithm. In the first block, where their inputs are the same, errors
# differ by less than one part in ten thousand, because rounding breaks ties. From the second block
# on each solves for what its own pruned blocks make; the common judge, on the dense model's inputs,
# then finds a layer better or worse by up to a hundredth, and the mean by up to a thousandth, on
# random weights.
_FIRST_BLOCK_MARGIN = 5e-4

_MEAN_MARGIN = 5e-3

_NOTES = (
    "total = load + prune + save; import is the time to import the packages, and no part of it",
    "CPU time is what the process computed; on a machine that does other work too, it says more "
    "than the time that passed",
    "peak memory is that of a side's whole process (VmHWM), imports included",
    "the error of a layer is tr((W-Z) H (W-Z)^T) / tr(W H W^T), H from the dense model's inputs; "
    "in the first block both sides work on those, later each on what its own pruning made",
    "both sides: SparseGPT, 2:4, damping 0.01, blocks of 128 columns, float32, head left dense, "
    "no padding, documents in a row not kept apart, the same allocator settings; sequential by "
    "decoder block, or with --order dense on the dense model's inputs (propagate_error=False)",
    "llm-compressor calibrates with eager attention, as it always does, and runs in its own "
    "environment with the transformers that it asks for",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--against", choices=["llmcompressor"], required=True, help="the tool to compare with"
    )
    model = "random (a Llama of 4 blocks, width 1024), embedded, or a model folder"
    add_option(parser, "--model", "random", model)
    text = (
        "text for a real model, as data.calibration of jobs.prune; a random one gets random tokens"
    )
    add_option(parser, "--calibration", "stdlib", text)
    add_calibration(parser, samples=128, length=256, batch_size=8)
    add_threads(parser)
    repeats = "runs of each side, in turn, after one that does not count; the median counts"
    add_option(parser, "--repeats", 3, repeats)
    walk = "this project's walk: the model in memory, or streamed from its files"
    add_option(parser, "--walk", "memory", walk, choices=["memory", "streamed"])
    order = (
        "when inputs are measured: block, and dense on both sides; layer is this project's alone, "
        "and the other side's is block then"
    )
    add_option(parser, "--order", "block", order, choices=["block", "layer", "dense"])


def run(options: Namespace) -> Outcome:
    """Set up, run both sides in turn, judge their checkpoints.

    Raises:
        InputError: the other tool could not be installed, or no such model or text.
        TwofourError: a side failed; its log is named.
    """
    num_threads = options.threads or num_cpus()
    python = llmcompressor_python(options.workdir)
    work = options.workdir / f"prune-{Path(options.model).name}"
    work.mkdir(parents=True, exist_ok=True)
    dense, rows = _prepare(options, work)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in _SIDES}
    for turn in range(1 + options.repeats):
        for side in _SIDES:
            found = run_side(side, python, dense, work, num_threads, options)
            if turn:  # the first one reads files and compiles what is kept for later ones
                runs[side].append(found)
    pruned = {side: work / side for side in _SIDES}
    figures = compare(dense, pruned, rows, options.batch_size)
    for side in _SIDES:
        figures[side] |= _median_run(runs[side])
    figures["versions"] = {
        "llmcompressor": installed_versions(
            python, ("llmcompressor", "torch", "transformers", "compressed-tensors")
        )
    }
    settings = {
        "model": options.model,
        "shape": _SHAPE if options.model == "random" else None,
        "num_samples": options.samples,
        "sequence_length": options.length,
        **settings_of(options, "batch_size", "repeats", "walk", "order", "seed"),
    }
    return summarise(figures, settings, num_threads)


def _prepare(options: Namespace, work: Path) -> tuple[Path, TokenRows]:
    """The dense model's folder and the rows, which are saved once for both sides."""
    if options.model == "random":
        dense = options.workdir / f"{_SHAPE}-vocab{_VOCABULARY}-seed{options.seed}"
        if not dense.is_dir():
            config = llama_config(_SHAPE, 4, 4096, _VOCABULARY)
            write_checkpoint(dense, config, options.seed, torch.float32)
        rows = random_rows(options.samples, options.length, _VOCABULARY, options.seed)
    else:
        dense = resolve_path(options.model)
        data = DataConfig(calibration=options.calibration, sequence_length=options.length)
        rows, warning = load_rows(
            data, "calibration", load_tokenizer(dense), options.samples, options.seed
        )
        if warning:
            raise InputError(f"--samples {options.samples}: {warning}")
    save_file({"input_ids": rows.ids_NT}, work / "rows.safetensors")
    return dense, TokenRows.whole(rows.ids_NT)


def run_side(
    side: str,
    python: Path,
    dense: Path,
    work: Path,
    num_threads: int,
    options: Namespace,
) -> dict[str, Any]:
    """Prune in a fresh process of one side; its seconds and peak memory.

    Args:
        side: twofour or llmcompressor.
        python: interpreter of llm-compressor's environment.
        dense: model folder.
        work: folder with rows.safetensors; the side's model and log go there.
        num_threads: CPU threads.
        options: batch_size, order, and walk for this project's side.
    """
    out, result, log = work / side, work / f"{side}.json", work / f"{side}.log"
    shutil.rmtree(out, ignore_errors=True)
    result.unlink(missing_ok=True)
    words = [options.order, dense, work / "rows.safetensors", out, result, num_threads]
    script = Path(__file__).parent / "sides" / "llmcompressor.py"
    start = (
        [sys.executable, "-m", "jobs.benchmarks.sides.twofour", options.walk]
        if side == "twofour"
        else [str(python), "-P", str(script)]
    )
    print(f"{side}: {num_threads} threads, log {log}", flush=True)
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads))
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables["MALLOC_MMAP_THRESHOLD_"] = str(4 * 2**20)  # as workers of jobs.prune have it
    if code := run_logged([*start, *map(str, words), str(options.batch_size)], log, variables):
        raise TwofourError(f"the side {side} ended with exit code {code}; see {log}")
    figures = json.loads(result.read_text(encoding="utf-8"))
    if side == "llmcompressor":
        figures["solve_s"] = logged_seconds(log.read_text(encoding="utf-8"))
    else:
        figures["solve_s"] = figures["prune_phases"]["factor"] + figures["prune_phases"]["solve"]
    return figures


def logged_seconds(log: str) -> float:
    """Seconds that llm-compressor says it has worked on its layers, rounded to hundredths each."""
    return sum(float(seconds) for seconds in re.findall(r"METRIC - time ([0-9.]+)s", log))


def compare(
    dense: Path, pruned: dict[str, Path], rows: TokenRows, batch_size: int
) -> dict[str, Any]:
    """What the common judge finds in both sides' checkpoints, and how far their masks agree."""
    figures: dict[str, Any] = judge(dense, pruned, rows, batch_size)
    names = list(next(iter(figures.values()))["layers"])
    first, second = pruned.values()
    figures["mask_agreement"] = mask_agreement(first, second, names)
    return figures


def _median_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run whose total time is the median (the lower one of two), with all totals."""
    for figures in runs:
        for clock, total in (("seconds", "total_s"), ("cpu_seconds", "total_cpu_s")):
            figures[total] = sum(figures[clock][step] for step in ("load", "prune", "save"))
    totals = [figures["total_s"] for figures in runs]
    middle = statistics.median_low(totals)
    return {**runs[totals.index(middle)], "all_totals_s": totals}


def _first_block_error(layers: dict[str, float]) -> float:
    """Mean error of the first block's layers."""
    start = next(iter(layers)).split(".0.")[0] + ".0."
    errors = [error for name, error in layers.items() if name.startswith(start)]
    return sum(errors) / len(errors)


def summarise(figures: dict[str, Any], settings: dict[str, Any], num_threads: int) -> Outcome:
    """Ratios, targets and tables from both sides' figures."""
    ours, theirs = (figures[side] for side in _SIDES)
    for side in (ours, theirs):
        side["first_block_error"] = _first_block_error(side["layers"])
    figures["ratio"] = {
        "total_s": ours["total_s"] / theirs["total_s"],
        "total_cpu_s": ours["total_cpu_s"] / theirs["total_cpu_s"],
        "prune_s": ours["seconds"]["prune"] / theirs["seconds"]["prune"],
        "peak_bytes": ours["peak_bytes"] / theirs["peak_bytes"],
        "mean_relative_error": ours["mean_relative_error"] / theirs["mean_relative_error"],
        "solve_s": ours["solve_s"] / theirs["solve_s"],
        "first_block_error": ours["first_block_error"] / theirs["first_block_error"],
        "worst_layer_error": max(
            ours["layers"][name] / theirs["layers"][name]
            for name in ours["layers"]
            if theirs["layers"][name] > 0
        ),
    }
    ratio = figures["ratio"]
    targets = [
        Target.at_most("total time, ratio", 1 / 3, ratio["total_s"]),
        Target.at_most("peak memory, ratio", 1.0, ratio["peak_bytes"]),
        Target.at_most(
            "first block's error, ratio", 1 + _FIRST_BLOCK_MARGIN, ratio["first_block_error"]
        ),
        Target.at_most("mean layer error, ratio", 1 + _MEAN_MARGIN, ratio["mean_relative_error"]),
        Target.at_most("2:4 violations", 0, ours["num_violations"]),
    ]
    notes = [
        *_NOTES,
        f"masks of the two sides agree in {100 * figures['mask_agreement']:.3f} % of the groups; "
        f"the layer worst for twofour has {ratio['worst_layer_error']:.6f} times their error",
    ]
    headings = ("", "twofour", f"llm-compressor {LLMCOMPRESSOR}", "ratio")
    table = Table(headings, _rows(ours, theirs, ratio))
    return Outcome("cpu", num_threads, settings, figures, [table], targets, notes)


def _rows(
    ours: dict[str, Any], theirs: dict[str, Any], ratio: dict[str, float]
) -> list[tuple[str, str, str, str]]:
    """The table: a figure of both sides in each row, and their ratio where a target needs it."""

    def row(name: str, key: str, written: Callable[[Any], str]) -> tuple[str, str, str, str]:
        value = (
            f"{ratio[key]:.6f}" if "error" in key else f"{ratio[key]:.3f}" if key in ratio else ""
        )
        return name, written(ours[key]), written(theirs[key]), value

    steps = [
        (name, f"{ours['seconds'][name]:.2f} s", f"{theirs['seconds'][name]:.2f} s", "")
        for name in ("import", "load", "prune", "save")
    ]
    return [
        *steps,
        row("total", "total_s", "{:.2f} s".format),
        row("  CPU time of it", "total_cpu_s", "{:.2f} s".format),
        row("  factor and solve", "solve_s", "{:.2f} s".format),
        row("peak memory", "peak_bytes", gigabytes),
        row("  after imports", "imported_bytes", gigabytes),
        row("mean layer error", "mean_relative_error", "{:.6f}".format),
        row("  of the first block", "first_block_error", "{:.6f}".format),
        row("2:4 violations", "num_violations", str),
        row("share of zeros", "sparsity", "{:.6f}".format),
    ]
