"""What signals mean to a command, and requests to save or to stop as a loop on a worker sees them.

Every command is run within `handling_signals`: SIGINT and SIGTERM end it by an `Interrupted` on the
main thread, at once, since what is finished is on disk already (of pruning, each block), and a
second one ends the process. While the recovery trains, `SignalRelay` has SIGTERM save first.

Signals cannot be handled where the training runs. Ray Train runs the training function on a thread
of the worker, and Python handles signals on a process's main thread only, where Ray has a handler
of its own that ends the worker. So the driver, whose main thread only waits (`cluster.runtime`),
turns a signal into a file in the run's folder, and the loop on rank 0 looks for the file. The same
files are the switches of a user: `touch RUN/save`, `touch RUN/stop`.

With Slurm, ask for signals to the batch shell alone (`--signal=B:TERM@300`) and pass them on to the
driver: SIGUSR1 sent to all processes of a job would end Ray's own, which do not handle it.

A node that Ray drains is known through `ray.train.get_preemption_info()`, a barrier of all workers.
The answer to it is to save and continue: a loop that returns has finished the run for good. Rank 0
says when to ask (`DrainWatch`), so that all workers do at the same step.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

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
    is_time_limit: bool = False
    """whether the time is up, and nobody asked"""


class Interrupted(KeyboardInterrupt):
    """A signal has ended the command, which says so in one line: this error's text.

    Attributes:
        exit_code: 130 after SIGINT, else 75: the same command continues.
        done: what was finished and where the same command continues; "" where nobody knows.
    """

    def __init__(self, received: signal.Signals, done: str = "") -> None:
        super().__init__(received.name)
        self.received = received
        self.done = done

    @property
    def exit_code(self) -> int:
        """Of the process."""
        return 128 + self.received if self.received == signal.SIGINT else os.EX_TEMPFAIL

    def __str__(self) -> str:
        """One line for the terminal."""
        done = self.done or "run the same command again to continue from what is finished"
        return f"interrupted ({self.received.name}); {done}"


class _Process:
    """What there is once in a process: its handlers, and what they have been asked for."""

    handlers: ClassVar[dict[signal.Signals, Callable[[int, FrameType | None], None]]] = {}
    asked: signal.Signals | None = None
    """a stop that was asked for and is to come between two stages"""
    ending: Interrupted | None = None
    """what ends the command; raised, but a library may have swallowed it"""
    is_abandoned = False
    after: Callable[[], None] | None = None
    """called before an abandoned process ends"""


_Before = dict[signal.Signals, tuple[Any, Any]]
"""signal -> the handler that there was, and ours that there was, None for somebody else's"""


def _install(handlers: dict[signal.Signals, Any]) -> _Before:
    """Make these the handlers; those that were there. What is ignored stays so (nohup, `&`)."""
    before = {}
    for number, handler in handlers.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            ours = _Process.handlers.get(number)
            before[number] = signal.signal(number, handler), ours
            _Process.handlers[number] = handler
    return before


def _put_back(before: _Before) -> None:
    for number, (handler, ours) in before.items():
        signal.signal(number, handler)
        _Process.handlers.pop(number)
        if ours is not None:
            _Process.handlers[number] = ours


def check_signals() -> None:
    """Now and then while the main thread waits: see to it that signals are heard.

    Ray, as it starts, puts a handler of C++ in the place of ours, which aborts: ours are set again.
    An extension module, while it is imported, swallows what a handler raises: it is raised again.
    """
    if threading.current_thread() is threading.main_thread():
        for number, handler in _Process.handlers.items():
            signal.signal(number, handler)
        if _Process.ending is not None:
            raise _Process.ending


def _say_aside(say: Callable[[str], None], text: str) -> None:
    """For handlers, which may have come in the middle of a line of the main thread: a stream that
    is entered again by the same thread raises, and another thread waits.

    Not by `threading.Thread`, whose start takes a lock that the main thread may be holding.
    """
    _thread.start_new_thread(say, (text,))


@contextlib.contextmanager
def handling_signals(say: Callable[[str], None]) -> Iterator[None]:
    """Around a command, on the main thread: SIGINT and SIGTERM raise `Interrupted`, once.

    The second one ends the process with the same exit code. SIGUSR1 asks for a checkpoint, which
    only a recovery makes on request: elsewhere it is answered with a line, and work goes on.

    Args:
        say: called with one line of text, for the terminal; on a thread of its own.
    """

    def end(number: int, frame: FrameType | None) -> None:
        interrupted = Interrupted(signal.Signals(number))
        if _Process.ending is not None:
            os._exit(interrupted.exit_code)
        _Process.ending = interrupted
        raise interrupted

    def save(number: int, frame: FrameType | None) -> None:
        words = "SIGUSR1: only a recovery has a checkpoint to make; what is finished is on disk"
        _say_aside(say, words)

    _Process.ending = _Process.asked = None
    before = _install({signal.SIGINT: end, signal.SIGTERM: end, signal.SIGUSR1: save})
    try:
        yield
    finally:
        _put_back(before)
        _Process.ending = None


@contextlib.contextmanager
def telling(done: Callable[[], str]) -> Iterator[None]:
    """Around work: have an `Interrupted` that ends it say what is done and how it continues."""
    try:
        yield
    except Interrupted as interrupted:
        interrupted.done = interrupted.done or done()
        raise


def end_if_asked() -> None:
    """Between two stages: raise `Interrupted` if a stop was asked for too late for a stage."""
    check_signals()
    if _Process.asked is not None:
        raise Interrupted(_Process.asked)


def abandon(after: Callable[[], None] | None = None) -> None:
    """Have `end_process` wait for nothing: threads of this process may hang for ever.

    Args:
        after: called by `end_process`, when the command has said all it has to say.
    """
    _Process.is_abandoned = True
    _Process.after = after or _Process.after


def end_process(code: int) -> NoReturn:
    """End the process as `sys.exit` does, or at once where a Ray had to be abandoned."""
    if _Process.is_abandoned:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if _Process.after is not None:
            _Process.after()
        os._exit(code)
    sys.exit(code)


class SignalRelay:
    """Turns signals to the driver into switch files; a context manager around the training.

    SIGUSR1 asks for a checkpoint, SIGTERM for a checkpoint and the end. A second SIGTERM is handed
    to the handler that was there before, which ends the command. Switches left by an earlier run
    are removed at the start, and the handlers put back at the end. A stop that came after the last
    step is answered by `end_if_asked`, when the stage is done.

    Args:
        folder: of the run, seen by the workers too.
        on_signal: called with one line of text, for the terminal; on a thread of its own.

    Raises:
        ValueError: entered on another thread than the main one.
    """

    def __init__(self, folder: Path, on_signal: Callable[[str], None] | None = None) -> None:
        self._folder = folder
        self._on_signal = on_signal
        self._before: _Before = {}

    def __enter__(self) -> SignalRelay:
        """Remove old switches, install the handlers."""
        for switch in (SAVE, STOP):
            (self._folder / switch).unlink(missing_ok=True)
        self._before = _install(dict.fromkeys(_SIGNALS, self._handle))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Put back the handlers that were there."""
        _put_back(self._before)
        if kind is None and (self._folder / STOP).exists():
            (self._folder / STOP).unlink()
            _Process.asked = signal.SIGTERM

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        switch = _SIGNALS[received]
        path = self._folder / switch
        if switch == STOP and path.exists():
            signal.signal(number, self._before[received][0])
            os.kill(os.getpid(), number)
            return
        # Renamed into place, so that the loop never reads half a reason.
        temporary = path.with_name(f".{switch}.tmp")
        temporary.write_text(received.name, encoding="utf-8")
        temporary.replace(path)
        if self._on_signal is not None:
            doing = "saving, then stopping" if switch == STOP else "saving"
            _say_aside(self._on_signal, f"{received.name}: {doing} after this step")


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
                left = f"{max(0.0, left_s):.0f} s are left of the time limit"
                return Request(True, True, left, is_time_limit=True)
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
