"""One run that a plan was made for, as a worker does it: what it held and how long it worked.

Started by the benchmark `plan` in a process for every worker. The recovery is the one of
`jobs.training` and the pruning the one of `sparsify.pruning`; Ray alone is left out, and what Ray
and the imports take is no part of the figures: memory counts from what a process held before it
loaded a model.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.stages import StagedClusterSpec
from conf.options.data import DataConfig
from conf.options.distill import DistillConfig
from conf.schema import Config
from jobs.benchmarks.sides.step import Here
from jobs.benchmarks.support.random_llama import random_rows
from jobs.planning.processor import measure_rates
from jobs.training.build import build_recovery
from jobs.training.engine import Partitioner, check_names
from jobs.training.pace import Pace
from jobs.training.student import load_student
from jobs.training.teacher import load_teacher
from jobs.training.zero import deepspeed_config
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.data.store import TokenStore
from sparsify.methods import PruneParams, get_method
from sparsify.pattern import Pattern
from sparsify.pruning.prune import prune_checkpoint

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Folders:
    """Where a run finds its models and rows, and where it writes."""

    dense: Path
    """model folder"""
    student: Path
    """the same model, pruned"""
    rows: Path
    """token store of the recovery"""
    out: Path
    """empty; figures, checkpoints and pruned models go there"""


class Worker(Here):
    """This process, as one of several."""

    name = "plan"

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__("cpu", 1)
        self.rank, self.world_size, self.local_world_size = rank, world_size, world_size


class Held:
    """Memory of this process beyond what it held when this was made, in bytes (Linux)."""

    def __init__(self) -> None:
        self._before = _status("VmRSS")

    def forget(self) -> None:
        """Count the peak from here on."""
        _CLEAR.write_text("5")

    def peak(self) -> int:
        """Most that was held since the last `forget`."""
        return _status("VmHWM") - self._before


def _status(field: str) -> int:
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field} line; memory is read on Linux only")


def distill_config(run: dict[str, Any]) -> Config:
    """The configuration of a recovery: what `run` says, and no checkpoint on the way."""
    length, steps = run["sequence_length"], run["steps"]
    return Config(
        cluster=StagedClusterSpec(num_workers=run["workers"]),
        data=DataConfig(sequence_length=length),
        distill=DistillConfig(
            num_tokens=steps * run["batch_size"] * length, batch_size=run["batch_size"],
            checkpoint_every_steps=steps + 1, hang_after_s=3600.0, learning_rate=1e-5,
            checksum_every_steps=None, **run["distill"],
        ),
    )  # fmt: skip


def work(rank: int, run: dict[str, Any], folders: Folders, is_timed: bool) -> None:
    """One worker of a run; its figures go to `out/figures-RANK.json`.

    Args:
        rank: of this worker.
        run: "kind" (prune or distill), "workers" and the run's sizes, see the benchmark.
        folders: see there.
        is_timed: whether what the processor reaches is measured before and after it.
    """
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(run["workers"])}
    store = f"file://{folders.out.absolute()}/group"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=run["workers"])
    try:
        run_it = _prune if run["kind"] == "prune" else _distill
        if not is_timed:
            figures = run_it(rank, run, folders)
        else:  # in this process, for what a processor reaches is not the same in all minutes
            element_bytes = 2 if run.get("distill", {}).get("precision") == "bf16" else 4
            before = measure_rates(element_bytes)
            figures = run_it(rank, run, folders)
            figures["rates"] = [asdict(before), asdict(measure_rates(element_bytes))]
        text = json.dumps(figures)
        (folders.out / f"figures-{rank}.json").write_text(text, encoding="utf-8")
    finally:
        dist.destroy_process_group()


def _distill(rank: int, run: dict[str, Any], folders: Folders) -> dict[str, Any]:
    config = distill_config(run)
    settings, isolate = config.distill, config.data.isolate_documents
    context: Any = Worker(rank, run["workers"])
    store = TokenStore.open(folders.rows)
    check_names(deepspeed_config(settings, run["workers"], False))  # imports DeepSpeed
    held = Held()
    split = Partitioner(settings, run["workers"], False)
    student = load_student(folders.student, folders.dense, None, config, context, split)
    teacher = load_teacher(folders.dense, settings, None, context, store.rows([0]), isolate)
    scratch = folders.out / "scratch"
    scratch.mkdir(exist_ok=True)
    pace = Pace(context, settings, scratch, config.data.sequence_length)
    recovery = build_recovery(
        context, config, student, teacher, store, None, pace, scratch, folders.out
    )
    loaded = held.peak()
    held.forget()
    cpu_s, wall_s = [time.process_time()], [time.perf_counter()]
    peaks: list[int] = []

    def on_step(values: dict[str, Any]) -> None:
        cpu_s.append(time.process_time())
        wall_s.append(time.perf_counter())
        peaks.append(held.peak())
        held.forget()

    context.on_step = on_step
    recovery.train()
    return {
        "load_peak_bytes": loaded,
        "step_peak_bytes": peaks,
        "step_cpu_s": [b - a for a, b in itertools.pairwise(cpu_s)],
        "step_wall_s": [b - a for a, b in itertools.pairwise(wall_s)],
        "step_flops": recovery.step_flops,
    }


def _prune(rank: int, run: dict[str, Any], folders: Folders) -> dict[str, Any]:
    rows = random_rows(run["samples"], run["sequence_length"], run["vocabulary"], 0)
    comm = Comm.distributed() if run["workers"] > 1 else Comm.single()
    held = Held()
    held.forget()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    prune_checkpoint(
        folders.dense, folders.out / "pruned", rows, get_method(run["method"]),
        Pattern.parse("2:4"), PruneParams(), comm=comm,
        memory=Memory(run["batch_size"], run["dtype"], activations="device"),
        clock=time.perf_counter,
    )  # fmt: skip
    return {
        "peak_bytes": held.peak(),
        "cpu_s": time.process_time() - cpu_s,
        "wall_s": time.perf_counter() - wall_s,
    }
