"""A checkpoint larger than the memory that pruning it may hold."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.support.arguments import add_calibration, add_option, add_set, settings_of
from jobs.benchmarks.support.processes import Finished, run_watched
from jobs.benchmarks.support.random_llama import block_num_weights, llama_config, write_checkpoint
from jobs.benchmarks.support.record import Outcome, Table, Target, gigabytes
from sparsify.errors import InputError, TwofourError

SUMMARY = "prune a checkpoint larger than the memory that may be held"

EXAMPLES = ("memory --checkpoint-gb 6 --limit-gb 3",)

_VOCABULARY = 4096

_NUM_PROGRAMS = 5  # that the table names

_NOTES = (
    "held: anonymous and shared memory of the command and every process it starts, Ray's among "
    "them; pages of mapped files are apart, because the kernel takes them back when it needs them",
    "random weights: what pruning holds, nothing about quality",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_option(parser, "--checkpoint-gb", 6.0, "size of the bfloat16 checkpoint, in 1e9 bytes")
    add_option(parser, "--shape", "bench-1k", "shape of a block, as in the model benchmark")
    add_option(parser, "--limit-gb", 3.0, "memory that may be held, in 1e9 bytes")
    parser.add_argument(
        "--enforce",
        action="store_true",
        help="also have the kernel hold the limit, in a control group below this process's own "
        "(takes root)",
    )
    add_option(parser, "--method", "sparsegpt", "method")
    add_calibration(parser, samples=32, length=256, batch_size=4)
    add_set(parser, "jobs.prune")


def run(options: Namespace) -> Outcome:
    """Make the checkpoint if it is not there, prune it by the command line, watch the memory.

    Raises:
        InputError: a size too small for one block.
        TwofourError: the command failed; its log is named.
    """
    checkpoint, num_blocks, num_bytes = _checkpoint(options)
    run_dir = options.workdir / "memory-run"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = prune_command(options, checkpoint, run_dir)
    limit_bytes = int(options.limit_gb * 1e9)
    log = options.workdir / "memory.log"
    print(f"pruning {num_blocks} blocks, {gigabytes(num_bytes)}; log {log}", flush=True)
    finished = run_watched(command, log, limit_bytes, options.enforce)
    if finished.returncode != 0 and not finished.num_kills:
        raise TwofourError(f"jobs.prune ended with exit code {finished.returncode}; see {log}")
    shutil.rmtree(run_dir, ignore_errors=True)
    settings = settings_of(
        options, "checkpoint_gb", "shape", "limit_gb", "enforce", "method", "samples", "length",
        "batch_size", "seed",
    ) | {"blocks": num_blocks}  # fmt: skip
    here = f"{Path.cwd()}/"
    settings["prune_command"] = [word.replace(here, "") for word in command[1:]]
    return summarise(finished, num_bytes, limit_bytes, settings)


def _checkpoint(options: Namespace) -> tuple[Path, int, int]:
    """Folder, number of blocks and bytes of the random checkpoint; made once, block by block."""
    config = llama_config(options.shape, 1, 4096, _VOCABULARY)
    block_bytes = 2 * block_num_weights(config)
    outside_bytes = 2 * 2 * _VOCABULARY * config.hidden_size
    num_blocks = round((options.checkpoint_gb * 1e9 - outside_bytes) / block_bytes)
    if num_blocks < 1:
        raise InputError(
            f"--checkpoint-gb {options.checkpoint_gb}: one block is {gigabytes(block_bytes)}; ask "
            "for more"
        )
    config = llama_config(options.shape, num_blocks, 4096, _VOCABULARY)
    folder = options.workdir / f"{options.shape}-{num_blocks}-blocks-seed{options.seed}"
    if not folder.is_dir():
        print(f"writing {folder}", flush=True)
        write_checkpoint(folder, config, options.seed, torch.bfloat16)
    files = sorted(folder.glob("*.safetensors"))
    return folder, num_blocks, sum(path.stat().st_size for path in files)


def prune_command(options: Namespace, checkpoint: Path, run_dir: Path) -> list[str]:
    """The words of the ordinary command."""
    return [
        sys.executable, "-m", "jobs.prune", "stages=[prune]", f"model.path={checkpoint}",
        "model.dtype=bfloat16", f"run.dir={run_dir}", f"prune.method={options.method}",
        "prune.baselines=[]", f"prune.num_samples={options.samples}",
        f"prune.batch_size={options.batch_size}", f"data.sequence_length={options.length}",
        "cluster.num_workers=1", "cluster.dashboard=false", "tracker.wandb=off", *options.set,
    ]  # fmt: skip


def summarise(
    finished: Finished, checkpoint_bytes: int, limit_bytes: int, settings: dict[str, Any]
) -> Outcome:
    """Peak against the limit, and which programs held it."""
    peak = finished.peak
    figures = {
        "checkpoint_bytes": checkpoint_bytes,
        "limit_bytes": limit_bytes,
        "peak_held_bytes": peak.held,
        "peak_anonymous_bytes": peak.anonymous,
        "peak_shared_bytes": peak.shared,
        "peak_file_bytes": finished.peak_file,
        "peak_by_command_bytes": peak.by_command,
        "seconds": finished.seconds,
        "returncode": finished.returncode,
        "num_kills": finished.num_kills,
    }
    largest = sorted(peak.by_command.items(), key=lambda item: -item[1])
    others = sum(held for _, held in largest[_NUM_PROGRAMS:])
    programs = [*largest[:_NUM_PROGRAMS], (f"{len(largest[_NUM_PROGRAMS:])} others", others)]
    rows = [
        ("checkpoint", gigabytes(checkpoint_bytes), f"{checkpoint_bytes / limit_bytes:.2f}"),
        ("limit", gigabytes(limit_bytes), "1.00"),
        ("peak held", gigabytes(peak.held), f"{peak.held / limit_bytes:.2f}"),
        *((f"  {name}", gigabytes(held), f"{held / limit_bytes:.2f}")
          for name, held in programs),
        ("peak of mapped files", gigabytes(finished.peak_file), ""),
        ("time", f"{finished.seconds:.1f} s", ""),
    ]  # fmt: skip
    targets = [
        Target.at_most("exit code of the command", 0, abs(finished.returncode)),
        Target.at_most("peak held / limit", 1.0, peak.held / limit_bytes),
    ]
    if finished.num_kills is not None:
        targets.append(Target.at_most("killed at the limit", 0, finished.num_kills))
    table = Table(("", "memory", "of the limit"), rows)
    return Outcome("cpu", 1, settings, figures, [table], targets, list(_NOTES))
