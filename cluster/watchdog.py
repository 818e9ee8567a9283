"""A thread that ends a process whose steps have stopped coming, and leaves word of where it hung.

A rank that is stopped, or waits for one that is, raises nothing: collectives wait for minutes or
for ever. The watchdog of every rank notices by itself, writes the stacks of all its threads and
ends the process, which the backend sees as a lost worker and answers by restarting the group from
the last checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

EXIT_HANG = 75
"""exit code of a process that its watchdog ended: EX_TEMPFAIL, worth another try"""

_NUM_REMEMBERED = 101

_NUM_KNOWN = 3  # steps before their median says anything

_ON_HANG_TIMEOUT_S = 10.0

_MOST_POLL_S = 1.0

# Beyond the limit: the time in which the thread should have acted, were the interpreter alive.
_BACKSTOP_S = 30.0


class Watchdog:
    """Watches the heartbeats of a loop, used as a context manager around it.

    A step may take `limit_factor` times the median of the last ones, or `floor_s` if that is more.
    When it takes longer, all threads' stacks go to `stack_file` and to stderr, `on_hang` is called,
    and the process ends with `EXIT_HANG`. An interpreter that is stuck itself (C code that keeps
    the lock) is ended by faulthandler's own timer half a minute later, with exit code 1 and the
    same file. There is one such timer in a process, so there can be one watchdog.

    Args:
        stack_file: of this rank alone; appended to. Its folder must be there.
        floor_s: least limit, so that a pause of the machine is no hang.
        start_limit_s: limit while fewer than three steps are known: compiling, first allocations.
        on_hang: called with one line of text, for the log or the board, before the process ends; a
            call that does not return in 10 s is given up. It runs on another thread than the loop.
        limit_factor: times the median step, > 1.
        ends_process: for tests: False leaves the process running after `on_hang`, and watches no
            more.
        backstop_s: for tests: seconds beyond the limit until faulthandler's timer.

    Cost: one thread that wakes once a second, and some 0.1 ms per beat.
    """

    def __init__(
        self,
        stack_file: Path,
        floor_s: float = 120.0,
        start_limit_s: float = 1800.0,
        on_hang: Callable[[str], None] | None = None,
        *,
        limit_factor: float = 5.0,
        ends_process: bool = True,
        backstop_s: float = _BACKSTOP_S,
    ) -> None:
        if not (limit_factor > 1 and floor_s > 0 and start_limit_s > 0):
            raise ValueError(
                f"watchdog: {limit_factor=} must be above 1, {floor_s=} and {start_limit_s=} > 0"
            )
        self._path = stack_file
        self._limit_factor = limit_factor
        self._floor_s = floor_s
        self._start_limit_s = start_limit_s
        self._on_hang = on_hang
        self._ends_process = ends_process
        self._backstop_s = backstop_s
        self._steps_s: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        self._lock = threading.Lock()
        self._since_s = 0.0
        self._limit_s = start_limit_s
        self._file: TextIO | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        self._file = self._path.open("a", encoding="utf-8")
        self._arm(self.limit_s)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no more."""
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        assert self._file is not None
        self._file.close()

    @property
    def limit_s(self) -> float:
        """What a step may take from now on."""
        if len(self._steps_s) < _NUM_KNOWN:
            return max(self._start_limit_s, self._floor_s)
        return max(self._floor_s, self._limit_factor * statistics.median(self._steps_s))

    def beat(self) -> None:
        """A step is done."""
        now_s = time.monotonic()
        with self._lock:
            self._steps_s.append(now_s - self._since_s)
        self._arm(self.limit_s)

    @contextlib.contextmanager
    def allowing(self, limit_s: float) -> Iterator[None]:
        """Around work that is no step (a save, an evaluation): another limit.

        The next step's time counts from the end of it.
        """
        self._arm(limit_s)
        try:
            yield
        finally:
            self._arm(self.limit_s)

    def _arm(self, limit_s: float) -> None:
        with self._lock:
            self._since_s = time.monotonic()
            self._limit_s = limit_s
        if self._ends_process:
            timeout_s = limit_s + self._backstop_s
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=self._open_file())

    def _open_file(self) -> Any:
        assert self._file is not None, "the watchdog is used as a context manager"
        return self._file

    def _run(self) -> None:
        poll_s = min(_MOST_POLL_S, self._floor_s / 4)
        while not self._stop.wait(poll_s):
            with self._lock:
                over_s, limit_s = time.monotonic() - self._since_s, self._limit_s
            if over_s > limit_s:
                self._hang(over_s, limit_s)
                return

    def _hang(self, over_s: float, limit_s: float) -> None:
        text = f"no step for {over_s:.1f} s, the limit is {limit_s:.1f} s"
        if len(self._steps_s) >= _NUM_KNOWN:
            text += f" (median step {statistics.median(self._steps_s):.2f} s)"
        # Neither must keep the process alive: stderr may be closed or a pipe that nobody reads, and
        # the file may lie on the very disk that hangs.
        _in_time(lambda: self._dump(sys.stderr, text))
        _in_time(lambda: self._dump(self._open_file(), text))
        if self._on_hang is not None:
            on_hang = self._on_hang
            _in_time(lambda: on_hang(f"{text}; stacks in {self._path}"))
        if self._ends_process:
            os._exit(EXIT_HANG)

    def _dump(self, file: TextIO, text: str) -> None:
        # No clock in the text: the file's own time says when.
        file.write(f"watchdog: process {os.getpid()}: {text}\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.write("\n")
        file.flush()


def _in_time(call: Callable[[], None]) -> None:
    """Run a call on a thread of its own, and continue without it after 10 s or an error."""

    def run() -> None:
        with contextlib.suppress(Exception):
            call()

    thread = threading.Thread(target=run, name="watchdog's last words", daemon=True)
    thread.start()
    thread.join(_ON_HANG_TIMEOUT_S)
