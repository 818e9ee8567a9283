"""The board over which workers speak with the driver, and both ends of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train

from cluster.runtime.worker import POLL_S, is_peer_loss

OnEvent = Callable[[dict[str, Any]], None]


@ray.remote(num_cpus=0)
class Board:
    """Where workers post events, failures and rank 0's result, and the driver reads them."""

    def __init__(self) -> None:
        self.clear(0)

    def clear(self, number: int) -> None:
        """Forget everything, before the piece of work of this number."""
        self._events: list[dict[str, Any]] = []
        self._failure: dict[str, str] | None = None
        self._number, self._result = number, None

    def post(self, event: dict[str, Any]) -> None:
        """Add one event."""
        self._events.append(event)

    def fail(self, kind: str, message: str, traceback: str) -> None:
        """Record a failure: the first one, or the first that is not the loss of a peer."""
        failure = {"kind": kind, "message": message, "traceback": traceback}
        if self._failure is None or (is_peer_loss(self._failure) and not is_peer_loss(failure)):
            self._failure = failure

    @ray.method(enable_task_events=False)  # four a second would bury what the dashboard shows
    def drain(self) -> list[dict[str, Any]]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events

    def failure(self) -> dict[str, str] | None:
        """What `fail` left."""
        return self._failure

    def time(self) -> float:
        """Unix time on this machine, which is the driver's."""
        return time.time()

    def finish(self, number: int, result: Any) -> None:
        """Keep what a piece of work returned, unless it is that of a group given up meanwhile."""
        if number == self._number:
            self._result = result

    def result(self) -> Any:
        """What `finish` left."""
        return self._result


class BoardLine:
    """A worker's line to the board."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def post(self, event: dict[str, Any], label: str = "", wait: bool = False) -> None:
        """Send one event, under a name if the dashboard is to show it; `wait` for its arrival."""
        post = self._board.post
        shown = {"name": label} if label else {"enable_task_events": False}
        reference = post.options(**shown).remote(event)
        if wait:
            ray.get(reference)

    def fail(self, kind: str, message: str, traceback: str) -> None:
        """Report a failure; returns when it has arrived."""
        ray.get(self._board.fail.remote(kind, message, traceback))

    def time(self) -> float:
        """Unix time on the board's machine."""
        now_s: float = ray.get(self._board.time.remote())
        return now_s

    def is_draining(self) -> bool:
        """Whether Ray will soon take a node of the group away; a barrier of all workers."""
        return ray.train.get_preemption_info() is not None


class Watch:
    """Reads the board on a thread while the work runs, and once more at the end.

    `furthest` is the last step that the work said to have done, None before the first.
    """

    def __init__(self, board: Any, on_event: OnEvent) -> None:
        self._board = board
        self._on_event = on_event
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None
        self.furthest: int | None = None

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _run(self) -> None:
        while True:
            stopping = self._stop.wait(POLL_S)
            try:
                events = ray.get(self._board.drain.remote())
            except ray.exceptions.RayError:
                return  # the board went with its cluster; the work itself reports why
            try:
                for event in events:
                    if event["kind"] == "progress":
                        self.furthest = int(event["done"])
                    self._on_event(event)
            except Exception as error:  # the caller's, a full disk for one: raised at the end
                self._error = self._error or error
            if stopping:
                return
