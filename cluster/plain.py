"""A run's workers as plain processes of this machine, without Ray: quick to start and to debug.

What `cluster.executor=plain` chooses. It answers the calls that `RayCluster` answers and runs the
same work: with one worker in this very process, where a debugger works, with more in forked ones
over gloo (NCCL with GPUs). It has no dashboard, joins no other machine and restarts nothing: after
the loss of a worker the same command goes on from what was saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

from cluster.errors import ClusterError, WorkFailedError
from cluster.executor import OnEvent
from cluster.runtime.tasks import TaskProgress
from cluster.runtime.worker import POLL_S, Work, WorkerContext, guarded, is_peer_loss
from cluster.spec import ClusterSpec

_GRACE_S = 2.0
"""for the others of a group to say why they end, once one has"""


class _Line:
    """A worker's line to the driver: one function that takes events."""

    def __init__(self, send: OnEvent) -> None:
        self._send = send

    def post(self, event: dict[str, Any], label: str = "", wait: bool = False) -> None:
        """Send one event; it has arrived when this returns."""
        self._send(event)

    def fail(self, kind: str, message: str, traceback: str) -> None:
        """Report a failure; it has arrived when this returns."""
        self._send({"kind": "failure", "failure": (kind, message, traceback)})

    def is_draining(self) -> bool:
        """Nobody takes this machine away node by node."""
        return False

    def time(self) -> float:
        """The driver's clock is this machine's."""
        return time.time()


class PlainCluster:
    """Runs the work of one run on this machine; used as a context manager.

    Args:
        spec: size and limits.
        on_event: called with every event of the workers.

    Raises:
        ClusterError: on entering, if the spec has more than one machine.
    """

    dashboard: str | None = None

    def __init__(self, spec: ClusterSpec, on_event: OnEvent) -> None:
        self.spec = spec
        self._on_event = on_event

    def __enter__(self) -> PlainCluster:
        if self.spec.num_nodes > 1:
            raise ClusterError(
                f"cluster.executor=plain: runs on this machine alone, cluster {self.spec.name} has "
                f"{self.spec.num_nodes}; leave it out"
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing outlives a call of `run_workers` or `run_tasks`."""

    def exclude(self, nodes: Collection[str]) -> bool:
        """There is no other machine."""
        return False

    def run_workers(self, name: str, work: Work, payload: Any, storage: Path) -> Any:
        """Run `work(context, payload)` once on every worker; what it returned on rank 0.

        As `RayCluster.run_workers`, but a lost worker ends the work.

        Raises:
            WorkFailedError: the work raised, or a worker was lost.
        """
        size, port = self.spec.num_workers, _free_port()
        starts = [_Start(self.spec, name, rank, size, work, payload, port) for rank in range(size)]
        if size == 1:
            return self._run_here(starts[0], self._on_event)
        return _Group(starts, size, self._on_event).results()[0]

    def run_tasks(
        self, name: str, work: Work, payloads: Sequence[Any], what: str, steps: int | None = None
    ) -> list[Any]:  # fmt: skip
        """Run `work(context, payload)` for each payload, at most one per worker; results in order.

        As `RayCluster.run_tasks`, but a lost worker ends the work.

        Raises:
            WorkFailedError: a task raised, or its worker was lost.
        """
        progress = TaskProgress(self._on_event, name, what, len(payloads), steps)
        starts = [
            _Start(self.spec, name, 0, 1, work, payload, None, index)
            for index, payload in enumerate(payloads)
        ]
        if self.spec.num_workers == 1:
            results = []
            for index, start in enumerate(starts):
                results.append(self._run_here(start, progress.take))
                progress.end(index)
            return results
        return _Group(starts, self.spec.num_workers, progress.take, progress.end).results()

    def _run_here(self, start: _Start, on_event: OnEvent) -> Any:
        told: list[dict[str, str]] = []

        def send(event: dict[str, Any]) -> None:
            if event["kind"] == "failure":
                told.append(_as_failure(event))
            else:
                on_event(event)

        try:
            return start.run(send)
        except Exception:
            if not told:
                raise
            raise WorkFailedError(**told[0]) from None


class _Start:
    """One call of the work: on a worker of a group, or a task of its own where `port` is None."""

    def __init__(
        self, spec: ClusterSpec, name: str, rank: int, size: int, work: Work, payload: Any,
        port: int | None, task: int | None = None,
    ) -> None:  # fmt: skip
        self._spec, self._name, self._rank, self._size = spec, name, rank, size
        self._work, self._payload, self._port, self._task = work, payload, port, task

    def run(self, send: OnEvent) -> Any:
        """Run it in this process."""
        context = WorkerContext(
            _Line(send), self._name, self._rank, self._size, self._spec, self._size, self._task
        )
        with self._group():
            return guarded(context, self._work, self._payload)

    def run_forked(self, line: connection.Connection, slot: int, driver: int) -> None:
        """Run it in a process forked by `driver`; it ends without what the driver does at its end.

        `driver` comes from before the fork: it may be gone before the first line runs here.
        """
        code = 1
        with contextlib.suppress(BaseException):  # told over the line already
            Thread(target=_end_with, args=(driver,), daemon=True).start()
            for number in (signal.SIGINT, signal.SIGUSR1):  # the driver's, who tells its workers
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._spec.uses_gpu:
                os.environ["CUDA_VISIBLE_DEVICES"] = str(slot)
            line.send({"kind": "result", "value": self.run(line.send)})
            code = 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @contextlib.contextmanager
    def _group(self) -> Iterator[None]:
        if self._port is None:
            yield
            return
        import torch.distributed as dist  # costs torch, which the driver does without

        os.environ.update(
            RANK=str(self._rank), LOCAL_RANK="0" if self._spec.uses_gpu else str(self._rank),
            WORLD_SIZE=str(self._size), LOCAL_WORLD_SIZE=str(self._size),
            LOCAL_SIZE=str(self._size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self._port),
        )  # fmt: skip
        dist.init_process_group(
            "nccl" if self._spec.uses_gpu else "gloo", rank=self._rank, world_size=self._size
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


class _Group:
    """Forked processes, at most `most` at a time, and what comes over their lines.

    Args:
        starts: one per process.
        most: processes at a time.
        on_event: called with what is no failure and no result.
        on_done: called with the place of each whose result has come.
    """

    def __init__(
        self, starts: Sequence[_Start], most: int, on_event: OnEvent,
        on_done: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        self._on_event = on_event
        self._on_done = on_done
        self._waiting = list(enumerate(starts))[::-1]
        self._free = list(range(most))[::-1]
        self._alive: dict[Any, tuple[int, int, BaseProcess]] = {}  # by the line to it
        self._results: dict[int, Any] = {}
        self._failures: list[dict[str, str]] = []
        self._num_starts = len(starts)

    def results(self) -> list[Any]:
        """Run all; what they returned, in their order.

        Raises:
            WorkFailedError: of the first that failed for a reason of its own.
        """
        try:
            while self._alive or self._waiting:
                while self._waiting and self._free:
                    self._fork(*self._waiting.pop())
                self._hear(None)
        finally:
            for _, _, process in self._alive.values():
                process.kill()
                process.join()
        return [self._results[index] for index in range(self._num_starts)]

    def _fork(self, index: int, start: _Start) -> None:
        ours, theirs = connection.Pipe(duplex=False)
        slot = self._free.pop()
        process = get_context("fork").Process(
            target=start.run_forked, args=(theirs, slot, os.getpid())
        )
        process.start()
        theirs.close()
        self._alive[ours] = (index, slot, process)

    def _hear(self, timeout_s: float | None) -> bool:
        """Take what has arrived; False if nothing has in that time."""
        ready: list[Any] = connection.wait(list(self._alive), timeout_s)
        for line in ready:
            try:
                event = line.recv()
            except (EOFError, OSError):
                self._end(line)
                continue
            if event["kind"] == "failure":
                self._failures.append(_as_failure(event))
            elif event["kind"] == "result":
                index = self._alive[line][0]
                self._results[index] = event["value"]
                if self._on_done is not None:
                    self._on_done(index)
            else:
                self._on_event(event)
        return bool(ready)

    def _end(self, line: Any) -> None:
        index, slot, process = self._alive.pop(line)
        process.join()
        self._free.append(slot)
        if index in self._results:
            return
        while self._alive and not self._own_failures() and self._hear(_GRACE_S):
            pass
        if failures := self._own_failures() or self._failures:
            raise WorkFailedError(**failures[0])
        text = f"a worker was lost (exit code {process.exitcode}); run the same command again"
        raise WorkFailedError("WorkerLost", text)

    def _own_failures(self) -> list[dict[str, str]]:
        return [one for one in self._failures if not is_peer_loss(one)]


def _end_with(driver: int) -> None:
    """End this worker when its driver is gone: the next one resumes, and two must not write."""
    while os.getppid() == driver:
        time.sleep(POLL_S)
    os._exit(1)


def _free_port() -> int:
    """One that nothing on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _as_failure(event: dict[str, Any]) -> dict[str, str]:
    return dict(zip(("kind", "message", "traceback"), event["failure"], strict=True))
