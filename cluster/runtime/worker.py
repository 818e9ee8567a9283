"""What a worker knows of where it runs, and what it can say to the driver.

Imports no Ray, so that code for workers can name `WorkerContext` and run without a cluster.
"""

from __future__ import annotations

import contextlib
import time
import traceback as traceback_module
from collections.abc import Callable
from typing import Any, Protocol

from cluster.machine import peak_memory_bytes
from cluster.spec import ClusterSpec

Work = Callable[["WorkerContext", Any], Any]

POLL_S = 0.25
"""how often progress leaves a worker, and how often the driver looks"""

_MEMORY_EVERY_S = 10.0

_PEER_LOST = ("connection closed", "connection reset", "broken pipe", "nccl", "gloo", "timed out")


def is_peer_loss(failure: dict[str, str]) -> bool:
    """Whether an exception only says that another worker of the group is gone."""
    kinds = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")
    text = failure["message"].lower()
    return failure["kind"] in kinds and any(word in text for word in _PEER_LOST)


class Line(Protocol):
    """A worker's line to the driver; `cluster.runtime.board.BoardLine` with Ray."""

    def post(self, event: dict[str, Any], label: str = "", wait: bool = False) -> None:
        """Send one event, shown as `label` where there is a dashboard; `wait` for its arrival."""

    def fail(self, kind: str, message: str, traceback: str) -> None:
        """Report a failure; returns when it has arrived."""

    def is_draining(self) -> bool:
        """Whether a node of the group will soon be taken away."""

    def time(self) -> float:
        """Unix time on the driver's machine."""


class WorkerContext:
    """What a worker knows of where it runs."""

    def __init__(
        self, line: Line, name: str, rank: int, world_size: int, spec: ClusterSpec,
        local_world_size: int = 1, task: int | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.task = task  # its number among those of its call; None: a worker of a group
        self.rank = rank
        self.world_size = world_size
        self.local_world_size = local_world_size  # workers on this node
        self.num_threads = spec.threads_per_worker
        self.device = "cuda" if spec.uses_gpu else "cpu"
        self._line = line
        self._last_post_s = 0.0
        self._last_shown: tuple[float, float] | None = None
        self._last_memory_s = 0.0

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Say how far this piece of work is; at most a few times a second leave the process.

        Rank 0 speaks for all; each worker says now and then how much memory it has held. The
        dashboard gets a line for each percent, whatever the number of steps: it shows 10,000.
        """
        now_s = time.monotonic()
        if now_s - self._last_memory_s >= _MEMORY_EVERY_S:
            self._last_memory_s = now_s
            with contextlib.suppress(OSError):  # read on Linux alone
                event = {"kind": "memory", "name": self.name, "rank": self.rank}
                self._line.post({**event, "peak_bytes": peak_memory_bytes()})
        if self.rank == 0 and (done >= total or now_s - self._last_post_s >= POLL_S):
            self._last_post_s = now_s
            event = {"kind": "progress", "name": self.name, "done": done, "total": total}
            percent = (total, done // (total / 100) if total else 100.0)
            is_news, self._last_shown = percent != self._last_shown, percent
            label = f"{self.name} {done:g}/{total:g}" if is_news else ""
            task = {} if self.task is None else {"task": self.task}
            self._line.post({**event, "text": text, **task}, label)

    def metrics(self, values: dict[str, Any], step: int | None = None) -> None:
        """Send figures to the run's tracker (rank 0 only)."""
        if self.rank == 0:
            event = {"kind": "metrics", "name": self.name, "values": values, "step": step}
            self._line.post(event)

    def say(self, message: str) -> None:
        """Show a line on the terminal that is no warning (rank 0 only)."""
        self._tell("info", message)

    def warn(self, message: str) -> None:
        """Send a warning to the terminal and the report (rank 0 only)."""
        self._tell("warning", message)

    def _tell(self, kind: str, message: str) -> None:
        if self.rank == 0:
            self._line.post({"kind": kind, "name": self.name, "text": message})

    def is_draining(self) -> bool:
        """Whether a node of the group will soon be taken away.

        A barrier: every worker of `run_workers` calls it, equally often. All get the same answer.
        """
        return self._line.is_draining()

    def driver_time(self) -> float:
        """Unix time on the driver's machine at a moment of this call, which asks for it."""
        return self._line.time()

    def alert(self, message: str) -> None:
        """`warn` from any worker, of something that concerns this one; returns when it is heard.

        The process may end right after, and calls still on their way would go with it.
        """
        text = f"{self.name}: worker {self.rank}: {message}"
        self._line.post({"kind": "warning", "name": self.name, "text": text}, wait=True)

    def fail(self, error: Exception) -> None:
        """Report the error that this piece of work ends with; called while it is handled."""
        message = str(error) or repr(error)
        self._line.fail(type(error).__name__, message, traceback_module.format_exc())


def guarded(context: WorkerContext, work: Work, payload: Any) -> Any:
    """Run the work; report a failure before it takes the process down."""
    try:
        return work(context, payload)
    except Exception as error:
        context.fail(error)
        raise
