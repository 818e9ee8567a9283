"""How the driver hears what workers post: events read from the board on a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray

from cluster.runtime.worker import POLL_S

OnProgress = Callable[[dict[str, Any]], None]


class Watch:
    """Reads the board on a thread while the work runs, and once more at the end.

    `furthest` is the last step that the work said to have done, None before the first.
    """

    def __init__(self, board: Any, on_event: OnProgress) -> None:
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
                events, _ = ray.get(self._board.drain.remote())
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
