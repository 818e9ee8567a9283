"""Where hidden states wait between blocks, and what is left beside them for what saves work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from cluster.runtime.worker import WorkerContext
from conf.schema import Config
from sparsify.calibration.hidden_states import Memory, Placement
from sparsify.comm import Comm
from sparsify.models.load import DTYPES, read_config

ROOM_ON_GPU = 0.4
"""of the free memory that all of this may take; the rest is for the solver"""

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


@dataclass(frozen=True)
class Sizes:
    """What the hidden states of one worker's walk take, and what they may; bytes."""

    states: float
    ahead: float
    """what the dense model does ahead, which is on the device with the states"""
    on_device: float
    on_host: float
    is_one_memory: bool
    """the device is the CPU"""

    @property
    def place(self) -> Placement:
        """Where there is room for the states."""
        if self.states + self.ahead <= self.on_device:
            return "device"
        return "host" if self.states <= self.on_host else "disk"

    def spare(self, place: Placement) -> float:
        """What is left on the device if the states wait at `place`."""
        taken = 0.0
        if place == "device":
            taken = self.states + self.ahead
        elif place == "host" and self.is_one_memory:
            taken = self.states
        return max(self.on_device - taken, 0.0)


def walk_sizes(
    context: WorkerContext, config: Config, model: Path, num_tokens: int, has_teacher: bool,
    is_ahead: bool = False,
) -> Sizes:  # fmt: skip
    """What a walk takes on this worker, and what it may take now.

    What the dense model does ahead takes a model's hidden states once more, with a teacher six
    times.

    Args:
        context: this worker.
        config: of the run.
        model: folder of the model that is walked.
        num_tokens: of all calibration rows.
        has_teacher: whether the dense model is followed too.
        is_ahead: whether the dense model passes the next block meanwhile.
    """
    shape = read_config(model).get_text_config()
    states = (
        num_tokens / context.world_size * shape.hidden_size
        * DTYPES[config.model.dtype].itemsize * (2 if has_teacher else 1)
    )  # fmt: skip
    ahead = (3 * states if has_teacher else states) if is_ahead else 0.0
    workers_here = max(1, context.world_size // config.cluster.num_nodes)
    on_host = _ROOM_ON_HOST * available_bytes() / workers_here
    if context.device == "cuda":
        return Sizes(states, ahead, ROOM_ON_GPU * free_gpu_bytes(), on_host, False)
    return Sizes(states, ahead, on_host, on_host, True)


def placed(comm: Comm, own: Sizes, asked: str, memory: Memory) -> Memory:
    """The memory of a walk, one decision for all workers, by the one with the least room.

    Hidden states wait on the device if they alone fit there. What is left of it goes to what the
    model gives its blocks, which is made once for as many batches as it can be kept for, and then
    to forwards that wait while layers are solved (`calibration.room`).

    Args:
        comm: the workers; all of them call this.
        own: of this worker.
        asked: where hidden states wait: device, host, disk, or auto, where there is room.
        memory: the rest.
    """
    places: list[Placement] = comm.gather_objects(own.place)
    place: Placement = (
        max(places, key=_PLACES.index) if asked == "auto" else asked  # type: ignore[assignment]
    )
    spare = min(comm.gather_objects(own.spare(place)))
    return replace(memory, activations=place, spare_bytes=spare)


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
