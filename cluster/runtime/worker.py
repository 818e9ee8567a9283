"""What a worker knows of where it runs, and the board over which it speaks with the driver.

A part of cluster/runtime/backend.py in a file of its own: this is the side of the workers.
"""

from __future__ import annotations

import time
import traceback as traceback_module
from collections.abc import Callable
from typing import Any

import ray
import ray.train

from cluster.spec import ClusterSpec

Work = Callable[["WorkerContext", Any], Any]

POLL_S = 0.25
"""how often progress leaves a worker, and how often the driver looks"""

_PEER_LOST = ("connection closed", "connection reset", "broken pipe", "nccl", "gloo", "timed out")


def is_peer_loss(failure: dict[str, str]) -> bool:
    """Whether an exception only says that another worker of the group is gone."""
    kinds = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")
    text = failure["message"].lower()
    return failure["kind"] in kinds and any(word in text for word in _PEER_LOST)


@ray.remote(num_cpus=0)
class Board:
    """Where workers post progress, metrics and failures, and where the driver reads them."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._failure: dict[str, str] | None = None

    def post(self, event: dict[str, Any]) -> None:
        """Add one event."""
        self._events.append(event)

    def fail(self, kind: str, message: str, traceback: str) -> None:
        """Record a failure: the first one, or the first that is not the loss of a peer."""
        failure = {"kind": kind, "message": message, "traceback": traceback}
        if self._failure is None or (is_peer_loss(self._failure) and not is_peer_loss(failure)):
            self._failure = failure

    def drain(self) -> tuple[list[dict[str, Any]], dict[str, str] | None]:
        """Events since the last call, and the failure if there is one."""
        events, self._events = self._events, []
        return events, self._failure

    def clear(self) -> None:
        """Forget everything, before the next piece of work."""
        self._events, self._failure = [], None


class WorkerContext:
    """What a worker knows of where it runs."""

    def __init__(
        self, board: Any, name: str, rank: int, world_size: int, spec: ClusterSpec,
        local_world_size: int = 1,
    ) -> None:  # fmt: skip
        self.name = name
        self.rank = rank
        self.world_size = world_size
        self.local_world_size = local_world_size  # workers on this node
        self.num_threads = spec.threads_per_worker
        self.device = "cuda" if spec.uses_gpu else "cpu"
        self._board = board
        self._last_post_s = 0.0

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Say how far this piece of work is; at most a few times a second leave the process."""
        now_s = time.monotonic()
        if self.rank == 0 and (done >= total or now_s - self._last_post_s >= POLL_S):
            self._last_post_s = now_s
            event = {"kind": "progress", "name": self.name, "done": done, "total": total}
            label = f"{self.name} {done:g}/{total:g}"
            self._board.post.options(name=label).remote({**event, "text": text})

    def metrics(self, values: dict[str, Any], step: int | None = None) -> None:
        """Send figures to the run's tracker (rank 0 only)."""
        if self.rank == 0:
            event = {"kind": "metrics", "name": self.name, "values": values, "step": step}
            self._board.post.options(name=f"{self.name} metrics").remote(event)

    def warn(self, message: str) -> None:
        """Send a warning to the terminal and the report (rank 0 only)."""
        if self.rank == 0:
            self._board.post.remote({"kind": "warning", "name": self.name, "text": message})

    def is_draining(self) -> bool:
        """Whether a node of the group will soon be taken away.

        A barrier: every worker of `run_workers` calls it, equally often. All get the same answer.
        """
        return ray.train.get_preemption_info() is not None

    def alert(self, message: str) -> None:
        """`warn` from any worker, of something that concerns this one; returns when it is heard.

        The process may end right after, and calls still on their way would go with it.
        """
        text = f"{self.name}: worker {self.rank}: {message}"
        ray.get(self._board.post.remote({"kind": "warning", "name": self.name, "text": text}))


def guarded(context: WorkerContext, work: Work, payload: Any) -> Any:
    """Run the work; post a failure to the board before it takes the process down."""
    try:
        return work(context, payload)
    except Exception as error:
        trace = traceback_module.format_exc()
        message = str(error) or repr(error)
        ray.get(context._board.fail.remote(type(error).__name__, message, trace))
        raise
