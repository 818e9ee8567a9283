"""The same pruning by 1, 2, 4, ... processes: how much faster, and whether masks stay the same."""

from __future__ import annotations

import json
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from jobs.benchmarks.support.arguments import add_calibration, add_option, settings_of
from jobs.benchmarks.support.random_llama import llama_config, random_model, random_rows
from jobs.benchmarks.support.record import Outcome, Table, Target, num_cpus
from jobs.benchmarks.support.stopwatch import phase_seconds
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.errors import InputError
from sparsify.masks.storage import load_masks, save_masks
from sparsify.methods import PruneParams, get_method
from sparsify.pattern import Pattern
from sparsify.pruning.prune import prune_model

SUMMARY = "the same pruning by 1, 2, 4 processes: speed-up and equal masks"

EXAMPLES = ("scaling --workers 1 2 --reduction fixed",)

_TARGET_SPEEDUP = 1.7

_TARGET_AGREEMENT = 0.9999

_VOCABULARY = 4096


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    workers = "numbers of processes; the first is what others are held against"
    add_option(parser, "--workers", [1, 2, 4], workers, type=int, nargs="+")
    order = "order in which processes add; fixed gives the same bits for any number of them"
    add_option(parser, "--reduction", "fast", order, choices=["fast", "fixed"])
    add_option(parser, "--shape", "bench-1k", "shape of the model, as in the model benchmark")
    add_option(parser, "--blocks", 4, "decoder blocks")
    add_option(parser, "--method", "sparsegpt", "method")
    add_calibration(parser, samples=128, length=256, batch_size=8)


def run(options: Namespace) -> Outcome:
    """Prune once per number of processes, each with one thread per process.

    Raises:
        InputError: a number of processes is less than 1 or given twice.
    """
    if min(options.workers) < 1 or len(set(options.workers)) < len(options.workers):
        raise InputError(f"--workers {options.workers}: give different numbers, 1 or more")
    task = settings_of(
        options, "shape", "blocks", "method", "samples", "length", "batch_size", "seed", "reduction"
    )
    with tempfile.TemporaryDirectory(prefix="twofour-scaling-") as name:
        folder = Path(name)
        for num_workers in options.workers:
            print(f"{num_workers} processes of one thread", flush=True)
            spawn(prune_as_worker, (num_workers, task, folder), nprocs=num_workers)
        return summarise(folder, options.workers, task)


def prune_as_worker(rank: int, num_workers: int, task: dict[str, Any], folder: Path) -> None:
    """One process: prune the common model with the others; rank 0 leaves times and masks."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{num_workers}"
    dist.init_process_group("gloo", store, rank=rank, world_size=num_workers)
    try:
        config = llama_config(task["shape"], task["blocks"], task["length"], _VOCABULARY)
        model = random_model(config, task["seed"], torch.float32, "cpu")
        rows = random_rows(task["samples"], task["length"], _VOCABULARY, task["seed"])
        dist.barrier()
        started_s = time.perf_counter()
        result = prune_model(
            model, rows, get_method(task["method"]), Pattern.parse("2:4"), PruneParams(),
            comm=Comm.distributed(is_fixed=task["reduction"] == "fixed"),
            memory=Memory(task["batch_size"]), clock=time.perf_counter,
        )  # fmt: skip
        dist.barrier()
        taken_s = time.perf_counter() - started_s
        if rank == 0:
            save_masks(folder / f"masks-{num_workers}.safetensors", result.keep_masks)
            figures = {"seconds": taken_s, "phases": phase_seconds(result.layers)}
            (folder / f"{num_workers}.json").write_text(json.dumps(figures), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def summarise(folder: Path, workers: list[int], task: dict[str, Any]) -> Outcome:
    """Speed-up and agreement of every number of processes with the first one."""
    found = {n: json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in workers}
    first = workers[0]
    reference = load_masks(folder / f"masks-{first}.safetensors")
    for num_workers, figures in found.items():
        masks = load_masks(folder / f"masks-{num_workers}.safetensors")
        figures["speedup"] = found[first]["seconds"] / figures["seconds"]
        figures["mask_agreement"] = group_agreement(reference, masks)
    rows = [
        (
            str(n), f"{figures['seconds']:.2f} s", f"{figures['speedup']:.3f}",
            f"{100 * figures['mask_agreement']:.5f} %",
        )
        for n, figures in found.items()
    ]  # fmt: skip
    targets = []
    wanted = 1.0 if task["reduction"] == "fixed" else _TARGET_AGREEMENT
    for n, figures in found.items():
        if n == 2 * first:
            targets.append(
                Target.at_least(f"{n} processes, speed-up", _TARGET_SPEEDUP, figures["speedup"])
            )
        if n != first:
            what = f"{n} processes, share of equal groups"
            targets.append(Target.at_least(what, wanted, figures["mask_agreement"]))
    notes = ["time from the start of calibration to gathered weights; no process start, no import"]
    if max(workers) > num_cpus():
        notes.append(
            f"there are {num_cpus()} CPUs: more processes than that share them, and their times "
            "say nothing of scaling"
        )
    table = Table(("processes", "time", "speed-up", "equal 2:4 groups"), rows)
    keyed = {str(n): figures for n, figures in found.items()}
    return Outcome("cpu", 1, task, keyed, [table], targets, notes)


def group_agreement(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Share of groups of four consecutive columns in which two sets of keep masks are equal."""
    same = total = 0
    for name, mask_OI in first.items():
        groups = (mask_OI == second[name]).reshape(-1, 4).all(1)
        same, total = same + int(groups.sum()), total + len(groups)
    return same / total
