"""What a person sees while a run works: one bar per stage with an ETA, or lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

_LOG_EVERY_S = 10.0


def _number() -> Column:
    return Column(no_wrap=True, min_width=7)


class Estimate:
    """How long a piece of work still takes, by how it went since it was first heard of.

    What came before is no part of it: workers that started, text that was tokenised, the first step
    with all that it loads. Another unit or total, or less done than before, is another piece.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._piece: tuple[str, float] | None = None
        self._first = self._last = (0.0, 0.0)

    def left_s(self, done: float, total: float, unit: str) -> float | None:
        """Take note of progress; the seconds left, None where nothing says how many."""
        now = (self._clock(), done)
        if self._piece != (unit, total) or done < self._last[1]:
            self._piece, self._first = (unit, total), now
        self._last = now
        (begun_s, begun), (now_s, _) = self._first, now
        if not begun < done < total:
            return None
        return (now_s - begun_s) / (done - begun) * (total - done)


class Display:
    """Progress of a run on stderr.

    On a terminal every stage has a live bar; elsewhere a line appears at most every ten seconds
    and when a piece of work is done, so that a log file stays readable.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._is_live = self.console.is_terminal
        # At 80 columns the numbers keep their width and the text is what gives way.
        self._progress = Progress(
            TextColumn("  [bold]{task.description}", table_column=Column(min_width=10)),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=_number()),
            TimeElapsedColumn(table_column=_number()),
            TextColumn("ETA"),
            TimeRemainingColumn(table_column=_number()),
            TextColumn(
                "[dim]{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=self.console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""
        self._estimate = Estimate()
        self._reached = ""
        self._logged_s = 0.0

    def __enter__(self) -> Display:
        """Start the live display."""
        if self._is_live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it and leave the last state on the screen."""
        if self._is_live:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Print one line above the bars."""
        self.console.print(f"  {text}", markup=False, soft_wrap=True)

    def start_stage(self, name: str) -> None:
        """A stage begins; its total is not known yet."""
        self._stage = name
        self._logged_s = time.monotonic()
        self._estimate = Estimate()
        self._reached = ""
        if self._is_live:
            self._tasks[name] = self._progress.add_task(name, total=None, text="starting workers")
        else:
            self.say(f"{name}: starting")

    def finish_stage(self, name: str, text: str) -> None:
        """A stage is done (or its earlier result is reused)."""
        if self._is_live:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=1, text=text)
            task = self._tasks[name]
            total = next(t.total for t in self._progress.tasks if t.id == task) or 1
            self._progress.update(task, total=total, completed=total, text=text)
            self._progress.stop_task(task)
        else:
            self.say(f"{name}: {text}")

    def reached(self, stage: str) -> str:
        """How far a stage is, as its last progress said: ` at 3/16 blocks`, or nothing."""
        return self._reached if stage == self._stage else ""

    def on_event(self, event: dict[str, Any]) -> None:
        """Take an event of the board: progress, information or a warning."""
        if event["kind"] == "info":
            self.say(event["text"])
        elif event["kind"] == "warning":
            self.say(f"warning: {event['text']}")
        elif event["kind"] == "progress":
            done, total, text = event["done"], event["total"], event.get("text", "")
            self._reached = f" at {done:g}/{total:g} {text}".rstrip()
            if self._is_live and self._stage in self._tasks:
                task = self._tasks[self._stage]
                self._progress.update(task, completed=done, total=total, text=text)
            elif not self._is_live:
                self._log(done, total, text)

    def _log(self, done: float, total: float, text: str) -> None:
        now_s = time.monotonic()
        left_s = self._estimate.left_s(done, total, text.partition(",")[0])
        if done < total and now_s - self._logged_s < _LOG_EVERY_S:
            return
        self._logged_s = now_s
        eta = "" if left_s is None else f", ETA {left_s:.0f} s"
        self.say(f"{self._stage}: {done:g}/{total:g} {text}{eta}".rstrip())
        sys.stderr.flush()
