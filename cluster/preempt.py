"""Requests to save or to stop, from signals, switch files and a time limit, as seen by a loop.

Signals cannot be handled where the training runs. Ray Train runs the training function on a thread
of the worker, and Python handles signals on a process's main thread only, where Ray has a handler
of its own that ends the worker. What does work: the driver's main thread, where Ray waits in a way
that lets handlers run (install them after `ray.init`, which sets one for SIGTERM). So the driver
turns a signal into a file in the run's folder, and the loop on rank 0 looks for the file. The same
files are the switches of a user: `touch RUN/save`, `touch RUN/stop`.

With Slurm, ask for signals to the batch shell alone (`--signal=B:TERM@300`) and pass them on to the
driver: SIGUSR1 sent to all processes of a job would end Ray's own, which do not handle it.

A node that Ray drains is known through `ray.train.get_preemption_info()`, a barrier of all workers.
The answer to it is to save and continue: a loop that returns has finished the run for good. Rank 0
says when to ask (`DrainWatch`), so that all workers do at the same step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

SAVE, STOP = "save", "stop"

_SIGNALS = {signal.SIGTERM: STOP, signal.SIGUSR1: SAVE}

_POLL_S = 1.0

_DRAIN_POLL_S = 60.0


@dataclass(frozen=True)
class Request:
    """What a loop is asked for; to stop always means to save first."""

    should_save: bool = False
    should_stop: bool = False
    reason: str = ""


class SignalRelay:
    """Turns signals to the driver into switch files; a context manager around a stage.

    SIGUSR1 asks for a checkpoint, SIGTERM for a checkpoint and the end. A second SIGTERM is handed
    to the handler that was there before, which ends the process. Switches left by an earlier run
    are removed at the start, and the handlers put back at the end.

    Args:
        folder: of the run, seen by the workers too.
        on_signal: called with one line of text, for the terminal.

    Raises:
        ValueError: entered on another thread than the main one.
    """

    def __init__(self, folder: Path, on_signal: Callable[[str], None] | None = None) -> None:
        self._folder = folder
        self._on_signal = on_signal
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalRelay:
        """Remove old switches, install the handlers."""
        for switch in (SAVE, STOP):
            (self._folder / switch).unlink(missing_ok=True)
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Put back the handlers that were there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        switch = _SIGNALS[received]
        path = self._folder / switch
        if switch == STOP and path.exists():
            signal.signal(number, self._before[received])
            os.kill(os.getpid(), number)
            return
        # Renamed into place, so that the loop never reads half a reason.
        temporary = path.with_name(f".{switch}.tmp")
        temporary.write_text(received.name, encoding="utf-8")
        temporary.replace(path)
        if self._on_signal is not None:
            doing = "saving, then stopping" if switch == STOP else "saving"
            self._on_signal(f"{received.name}: {doing} after this step")


class StopRequests:
    """What rank 0 looks at between two steps; it tells the others, so that all do the same.

    Args:
        folder: of the run, where the switches are.
        deadline_s: Unix time at which the machines will be taken away; None: no time limit. A time,
            not a duration, so that a worker restarted half-way knows how little is left; the clocks
            of the machines should agree within seconds.
        reserve_s: what must be left at the deadline for the save and the rest of the stage.
        poll_s: the folder is looked at this often, since it may be on a slow network disk; another
            one is for tests.
        clock: Unix time, for tests.
    """

    def __init__(
        self,
        folder: Path,
        deadline_s: float | None = None,
        reserve_s: float = 60.0,
        *,
        poll_s: float = _POLL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.reserve_s = reserve_s
        self._folder = folder
        self._deadline_s = deadline_s
        self._poll_s = poll_s
        self._clock = clock
        self._looked_at_s = -float("inf")

    def poll(self, next_step_s: float = 0.0) -> Request:
        """What is asked for now.

        Args:
            next_step_s: how long the next step will take, about: a step that would end too late for
                the save is not started.
        """
        now_s = self._clock()
        if self._deadline_s is not None:
            left_s = self._deadline_s - now_s
            if left_s <= self.reserve_s + next_step_s:
                return Request(True, True, f"{max(0.0, left_s):.0f} s are left of the time limit")
        if now_s - self._looked_at_s < self._poll_s:
            return Request()
        self._looked_at_s = now_s
        for switch in (STOP, SAVE):
            reason = self._read(switch)
            if reason is not None:
                return Request(True, switch == STOP, reason)
        return Request()

    def done(self, request: Request) -> None:
        """The save is committed: remove the switch, so that it is obeyed once.

        A request to stop answers one to save as well. Switches set since `poll` are lost with it:
        the save that has just been made is newer than a request to save, and a stop is a stop.
        """
        for switch in (SAVE, STOP) if request.should_stop else (SAVE,):
            (self._folder / switch).unlink(missing_ok=True)

    def _read(self, switch: str) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            text = (self._folder / switch).read_text(encoding="utf-8").strip()
            return f"{text or 'a user'} asked to {switch}"
        return None


class DrainWatch:
    """When to ask whether a node is being drained, and whether the answer is news.

    Args:
        poll_s: seconds between two questions, each a barrier of all workers; for tests.
        clock: seconds, for tests.
    """

    def __init__(
        self, *, poll_s: float = _DRAIN_POLL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._poll_s = poll_s
        self._clock = clock
        self._asked_at_s = clock()
        self._was_draining = False

    def is_due(self) -> bool:
        """Whether it is time to ask again; only rank 0's answer counts."""
        now_s = self._clock()
        if now_s - self._asked_at_s < self._poll_s:
            return False
        self._asked_at_s = now_s
        return True

    def is_news(self, is_draining: bool) -> bool:
        """Whether a drain has started since the last answer: one checkpoint is enough for each."""
        has_begun = is_draining and not self._was_draining
        self._was_draining = is_draining
        return has_begun
