"""A recovery on gloo processes of its own, without Ray: what its workers do, and how to disturb it.

Processes are forked from a server that has imported the heavy packages once, so that a test can
afford to kill many of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NUM_STEPS, BATCH, LENGTH = 12, 8, 32


@dataclass
class Worker:
    """Stands in for `WorkerContext`; keeps what it is told."""

    rank: int
    world_size: int
    said: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    is_node_draining: bool = False
    name: str = "distill"
    device: str = "cpu"
    num_threads: int = 1

    @property
    def local_world_size(self) -> int:
        return self.world_size

    def warn(self, message: str) -> None:
        if self.rank == 0:
            self.said.append(message)

    def say(self, message: str) -> None:
        self.warn(message)

    def alert(self, message: str) -> None:
        self.alerts.append(message)

    def progress(self, done: float, total: float, text: str = "") -> None:
        assert text

    def metrics(self, values: dict[str, Any], step: int | None = None) -> None:
        json.dumps(values, allow_nan=False)

    def is_draining(self) -> bool:
        return self.is_node_draining


def make_base(folder: Path, dense: Path) -> None:
    """A student with masks, its teacher, and rows of two documents of random tokens: no two rows
    are alike."""
    from sparsify.data.rows import TokenRows
    from sparsify.data.store_write import write_rows
    from sparsify.masks.storage import save_masks
    from sparsify.models.load import load_pair
    from sparsify.models.masked import infer_masks
    from sparsify.models.save import save_model
    from sparsify.pattern import Pattern

    (folder / "teacher").symlink_to(dense)
    model, tokenizer = load_pair(dense)
    masks = infer_masks(model, Pattern.parse("2:4"), may_be_dense=True)
    save_model(model, tokenizer, folder / "student")
    save_masks(folder / "student/sparsity/masks.safetensors", masks)
    (folder / "student/sparsity.json").write_text('{"pattern": "2:4", "provenance": {}}')
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(len(tokenizer), (80, LENGTH), generator=generator)
    begins = 1 + torch.arange(len(ids))[:, None] % (LENGTH - 1)
    places = torch.arange(LENGTH).expand(len(ids), -1)
    rows = TokenRows(ids, torch.where(places < begins, places, places - begins))
    write_rows(folder / "rows", {"train": rows}, tokenizer, LENGTH)


def make_recovery(base: Path, out: Path, **settings: Any) -> tuple[Any, Worker]:
    """A recovery as `jobs.distill` makes it, resumed from whatever is in `out`.

    Args:
        base: holds the folders `student`, `teacher` and `rows`.
        out: the run's folder.
        settings: of `DistillConfig`; with `heldout_every_steps`, the rows are held out too.
    """
    from conf.options.data import DataConfig
    from conf.options.distill import DistillConfig
    from conf.schema import Config
    from jobs.training.inputs import open_cache
    from jobs.training.pace import Pace
    from jobs.workers.distill import prepare

    scratch = out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    given = {
        "num_tokens": NUM_STEPS * BATCH * LENGTH, "batch_size": BATCH, "micro_batch_size": 2,
        "checkpoint_every_steps": 4, "learning_rate": 1e-3, "num_warmup_steps": 3,
        "weight_decay": 0.1, **settings,
    }  # fmt: skip
    config = Config(distill=DistillConfig(**given), data=DataConfig(sequence_length=LENGTH))
    worker = Worker(dist.get_rank(), dist.get_world_size())
    payload = {
        "config": config, "student": base / "student", "teacher": base / "teacher",
        "rotation": None, "folder": out, "scratch": scratch, "store": base / "rows",
        "run_dir": out, "cache": open_cache(config),
        "heldout": base / "rows" if config.distill.heldout_every_steps else None,
    }  # fmt: skip
    torch.manual_seed(config.run.seed)
    pace = Pace(worker, config.distill, scratch, LENGTH)
    recovery, *_ = prepare(worker, payload, pace)
    recovery.resume()
    return recovery, worker


def at_step(recovery: Any, step: int, act: Callable[[], None]) -> None:
    """Call `act` on this worker before the forward of one step (from 0), once."""
    before = recovery._step
    done: list[int] = []

    def run(number: int) -> Any:
        if number == step and not done:
            done.append(number)
            act()
        return before(number)

    recovery._step = run


def die_at_step(worker: Any, step: int) -> None:
    """Have the recovery that a module's `prepare` makes kill this process before one step."""
    prepare = worker.prepare

    def dying(*given: Any) -> Any:
        recovery, *rest = prepare(*given)

        def die() -> None:
            recovery._checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)

        at_step(recovery, step, die)
        return recovery, *rest

    worker.prepare = dying


def log_rows(recovery: Any) -> list[tuple[int, torch.Tensor]]:
    """(step, tokens) of every row that this worker computes gradients with, from here on."""
    seen: list[tuple[int, torch.Tensor]] = []
    before = recovery._backward

    def run(rows: Any, *args: Any) -> Any:
        seen.extend((len(recovery.curve), ids) for ids in rows.ids_NT.clone())
        return before(rows, *args)

    recovery._backward = run
    return seen


def state_hash(recovery: Any) -> str:
    """Of all weights and moments that this worker holds, and of the weights that compute."""
    from jobs.training import zero_state

    digest = hashlib.sha256()
    for one in zero_state.state_fragments(recovery.engine, for_saving=False):
        digest.update(one.values.detach().contiguous().numpy().tobytes())
    for _, param in recovery.engine.module.named_parameters():
        held = param.ds_tensor if hasattr(param, "ds_tensor") else param
        digest.update(held.detach().float().numpy().tobytes())
    return digest.hexdigest()


def results(recovery: Any) -> dict[str, Any]:
    """What a finished run is compared by: its curve, the model's bits, this worker's state."""
    from jobs.training import engine as _engine

    state = _engine.gathered_state_dict(recovery.engine)
    model = None
    if state is not None:
        parts = [state[name].float().numpy().tobytes() for name in sorted(state)]
        model = hashlib.sha256(b"".join(parts)).hexdigest()
    return {"curve": recovery.curve, "model": model, "state": state_hash(recovery)}


def _on_rank(rank: int, port: int, size: int, work: Any, args: tuple[Any, ...]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank), LOCAL_SIZE=str(size),
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    work(rank, *args)
    dist.barrier()
    # DeepSpeed keeps its process groups, so their threads live on. One that lets go of a tensor
    # while the interpreter shuts down aborts the process (torch 2.13), with the work long done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


_HEAVY = (
    "deepspeed", "transformers.models.llama.modeling_llama", "jobs.workers.distill",
    "jobs.training.loop", "jobs.training.teacher", "sparsify.pruning.prune",
    "sparsify.rotation.rotate", "ray.train.torch", "hydra", "rich", "jobs.cli.main",
    "jobs.pipeline", "pytest",
)  # fmt: skip


def warm_context() -> Any:
    """Processes forked from this test process's server, which has imported what is heavy once."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(_HEAVY))
    # Read when they are imported: DeepSpeed's device, and that Ray asks for its token.
    needed = {"DS_ACCELERATOR": "cpu", "RAY_AUTH_MODE": "token"}
    absent = needed.keys() - os.environ.keys()
    os.environ.update(needed)
    forkserver.ensure_running()
    for name in absent:
        del os.environ[name]
    return context


def exit_codes(size: int, work: Any, *args: Any, limit_s: float = 600.0) -> list[int | None]:
    """Run `work(rank, *args)` in `size` processes; how each ended, None if it had to be killed.

    As soon as one has failed, the others get two seconds to do so too.
    """
    context = warm_context()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    group: list[BaseProcess] = [
        context.Process(target=_on_rank, args=(rank, port, size, work, args))
        for rank in range(size)
    ]
    for process in group:
        process.start()
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s and any(p.is_alive() for p in group):
        if any(p.exitcode for p in group):
            deadline_s = min(deadline_s, time.monotonic() + 2.0)
        time.sleep(0.01)
    codes = [process.exitcode for process in group]
    for process in group:
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    return codes


def train_workers() -> list[psutil.Process]:
    """Workers of the tests' own Ray: another one on this machine has some too."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def run(size: int, work: Any, *args: Any) -> None:
    """Run `work(rank, *args)` in `size` processes, all of which must succeed."""
    assert exit_codes(size, work, *args) == [0] * size
