"""How often a group of workers is started again, with Ray Train and the board stood in for."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from cluster.errors import ClusterLostError, WorkFailedError
from cluster.runtime import backend as ray_backend
from cluster.runtime.board import Board
from cluster.spec import ClusterSpec


class Group:
    """Fails in the way of its script: each entry is the step that one start gets to, or a failure.

    The last entry is None for a start that succeeds.
    """

    def __init__(self, script: list[Any]) -> None:
        self.script = list(script)
        self.num_starts = 0
        self._events: list[Any] = []
        self._failure: Any = None
        self.number = 0
        self._result: tuple[int, Any] = (0, None)
        self.clear = SimpleNamespace(remote=self._clear)
        self.result = SimpleNamespace(remote=lambda: self._result)
        self.drain = SimpleNamespace(remote=lambda: self._events)
        self.failure = SimpleNamespace(remote=lambda: self._failure)

    def _clear(self, number: int) -> None:
        self.number, self._result = number, (0, None)

    def fit(self) -> None:
        self._result = (
            self.number,
            "what rank 0 returned",
        )  # a peer may end badly
        now = self.script[self.num_starts]
        self.num_starts += 1
        if isinstance(now, Exception):
            raise ControllerError(now)
        if isinstance(now, dict):
            self._events, self._failure = [], now
        elif now is not None:
            event = {"kind": "progress", "name": "distill", "done": now, "total": 9, "text": ""}
            self._events, self._failure = [event], None
        if now is not None:
            raise WorkerGroupError("a worker died", {1: RuntimeError("killed")})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run a script on a cluster that allows two failures; the group, and the warnings."""

    def start(script: list[Any]) -> tuple[Group, list[str]]:
        group, events = Group(script), []
        monkeypatch.setattr(ray_backend, "TorchTrainer", lambda *_, **__: group)
        monkeypatch.setattr(ray_backend.ray, "get", lambda value: value)
        monkeypatch.setattr(ray_backend.RayCluster, "log_folder", "LOGS")
        monkeypatch.setattr(ray_backend, "wait_for_hosts", lambda *_: start.waits.append(1))
        start.waits = []
        cluster = ray_backend.RayCluster(
            ClusterSpec(max_failures=2), "run", tmp_path, events.append
        )
        cluster._board = group
        try:
            start.result = cluster.run_workers("distill", lambda *_: None, None, tmp_path)
        finally:
            start.warnings = [e["text"] for e in events if e["kind"] == "warning"]
        return group, start.warnings

    return start


def test_a_run_that_gets_further_is_restarted_as_often_as_it_takes(started: Any) -> None:
    group, warnings = started([1, 2, 3, 4, 5, None])
    assert group.num_starts == 6
    assert len(warnings) == 5
    assert warnings[-1].startswith("distill: a worker was lost (")
    assert warnings[-1].endswith("worker lost at step 5; retried, 1 more without progress")


def test_one_that_does_not_is_given_up(started: Any) -> None:
    with pytest.raises(WorkFailedError, match=r"3 failures without progress since step 4.*LOGS"):
        started([4, 3, 4, None])
    assert len(started.warnings) == 2


def test_an_error_of_the_work_is_final(started: Any) -> None:
    failure = {"kind": "NonFiniteError", "message": "step 3 is bad", "traceback": ""}
    with pytest.raises(WorkFailedError, match="step 3 is bad"):
        started([1, failure, None])


def test_a_group_that_cannot_start_is_a_loss_and_machines_are_waited_for(started: Any) -> None:
    group, warnings = started([4, WorkerGroupStartupTimeoutError(2), None])
    assert group.num_starts == 3
    assert len(started.waits) == 3
    assert "timed out" in warnings[1]
    with pytest.raises(WorkFailedError, match="3 failures without progress since step 4"):
        started([4, *[WorkerGroupStartupTimeoutError(2)] * 3])
    with pytest.raises(WorkFailedError, match="Ray Train failed: no such thing"):
        started([ValueError("no such thing"), None])


def test_a_ray_that_has_died_is_the_reason_of_whatever_went_wrong(
    tmp_path: Path,
) -> None:
    stop = threading.Event()
    cluster = ray_backend.RayCluster(ClusterSpec(), "run", tmp_path, lambda _: None)
    lost = "Ray's raylet (process 7) on this machine has died; run the same command again"
    cluster._local = SimpleNamespace(lost=None, check=lambda: lost)

    def fail() -> None:
        raise RuntimeError("Ray Train failed: the actor died")

    def hang() -> None:
        cluster._local.lost = lost
        stop.wait()

    for what in (fail, hang):
        with pytest.raises(ClusterLostError, match=r"raylet \(process 7\).*same command again"):
            cluster._call(what)
    stop.set()


def test_the_loss_of_a_peer_is_no_error_of_the_work(started: Any) -> None:
    gloo = {"kind": "RuntimeError", "message": "gloo: Connection closed by peer", "traceback": ""}
    group, _ = started([1, gloo, None])
    assert group.num_starts == 3


def test_the_result_is_that_of_the_start_that_succeeds(started: Any) -> None:
    started([1, 2, None])
    assert started.result == (3, "what rank 0 returned")


def test_a_group_given_up_cannot_leave_a_result_behind() -> None:
    board = Board.__ray_metadata__.modified_class()
    board.clear(1)
    board.clear(2)  # the group was started again
    board.finish(1, "of the first")
    assert board.result() is None
    board.finish(2, "of the second")
    assert board.result() == "of the second"
    board.clear(3)
    assert board.result() is None
