"""How far a stage's tasks are together, from what each of them tells."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any


class TaskProgress:
    """The progress of all tasks of one call of `run_tasks` together, from that of each.

    Args:
        on_event: takes events; those that say no progress of a task pass through to it.
        name: stage.
        what: as given to `run_tasks`.
        num_tasks: of the call.
        steps: as given to `run_tasks`; without, what a task says of itself passes through as well.
    """

    def __init__(
        self, on_event: Callable[[dict[str, Any]], None], name: str, what: str, num_tasks: int,
        steps: int | None,
    ) -> None:  # fmt: skip
        self._on_event = on_event
        self._name, self._what = name, what
        self._steps = steps
        self._done = [0.0] * num_tasks
        self._lock = Lock()

    def take(self, event: dict[str, Any]) -> None:
        """Take an event of a task."""
        if event["kind"] == "progress" and self._steps is not None:
            self._tell(event["task"], event["done"])
        else:
            self._on_event(event)

    def end(self, task: int) -> None:
        """The task is done."""
        self._tell(task, self._steps or 1)

    def _tell(self, task: int, done: float) -> None:
        with self._lock:  # tasks end on one thread, and speak on another
            if done <= self._done[task]:
                return
            self._done[task] = done
            event = {"kind": "progress", "name": self._name, "done": sum(self._done)}
            total = len(self._done) * (self._steps or 1)
            self._on_event({**event, "total": total, "text": self._what})
