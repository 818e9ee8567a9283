"""Where hidden states wait between blocks: as asked for, or where a worker has room for them."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from cluster.runtime.worker import WorkerContext
from conf.schema import Config
from sparsify.calibration.hidden_states import Placement
from sparsify.calibration.layers import SolverNeeds
from sparsify.comm import Comm
from sparsify.models.load import DTYPES, read_config

_ROOM_ON_GPU = 0.4  # of the free memory that hidden states may take; the rest is for the solver

_ROOM_ON_HOST = 0.5

_PLACES: tuple[Placement, ...] = ("device", "host", "disk")

_CGROUP = Path("/sys/fs/cgroup")

_CGROUPS = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current", _CGROUP / "memory.stat", "inactive_file"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes",
     _CGROUP / "memory/memory.stat", "total_inactive_file"),
)  # fmt: skip
"""limit, use, figures and among them caches of files, of control groups in their second and first
version, as a container sees its own"""


def placement(
    context: WorkerContext, config: Config, model: Path, num_tokens: int, needs: SolverNeeds,
    is_ahead: bool = False,
) -> Placement:  # fmt: skip
    """Where there is room for the hidden states of a walk.

    On the device, where a pass over a block's layers one by one also holds forwards: for them
    a Llama keeps the hidden states twice more, its widest activation and, where documents share
    rows, a mask. What the dense model does ahead takes a model's hidden states once more, with a
    teacher six times.

    Args:
        context: this worker.
        config: of the run.
        model: folder of the model that is walked.
        num_tokens: of all calibration rows.
        needs: of the walk's solver; `teacher` and `order` count.
        is_ahead: whether the dense model passes the next block meanwhile.
    """
    shape = read_config(model).get_text_config()
    bytes_per_feature = (
        num_tokens / context.world_size
        * DTYPES[config.model.dtype].itemsize * (2 if needs.teacher else 1)
    )  # fmt: skip
    states = bytes_per_feature * shape.hidden_size
    widest = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    held = 2 * states + bytes_per_feature * widest
    if needs.order != "layer":
        held = 0
    elif config.data.isolate_documents:  # each held forward has its mask, (T, T) bytes a row
        held += num_tokens / context.world_size * config.data.sequence_length
    if is_ahead:
        held += 3 * states if needs.teacher else states
    workers_here = max(1, context.world_size // config.cluster.num_nodes)
    available = available_bytes() / workers_here
    if context.device == "cuda":
        if states + held <= _ROOM_ON_GPU * free_gpu_bytes():
            return "device"
    elif states + held <= _ROOM_ON_HOST * available:
        return "device"
    return "host" if states <= _ROOM_ON_HOST * available else "disk"


def agreed(comm: Comm, own: Placement) -> Placement:
    """The least roomy place of all workers: some decisions that follow have to be everyone's."""
    found: list[Placement] = comm.gather_objects(own)
    return max(found, key=_PLACES.index)


def available_bytes() -> float:
    """Memory of this machine that programs can have: what is free, and caches of files.

    In a container, at most what is left below its limit.
    """
    available = float(psutil.virtual_memory().available)
    for limit, used, stat, cached in _CGROUPS:
        try:
            most, taken = int(limit.read_text()), int(used.read_text())
            fields = dict(line.split() for line in stat.read_text().splitlines())
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
        available = min(available, most - taken + int(fields.get(cached, 0)))
    return max(available, 0.0)


def free_gpu_bytes() -> int:
    """Memory of this process's GPU that it can have: what is free, and what torch keeps unused."""
    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
