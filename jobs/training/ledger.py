"""Where a stage's time went: a ledger that survives every way a run can end, and its goodput.

One JSON line per interval, appended and flushed to the disk as it ends. A killed process leaves at
worst a torn last line, which is cut and said. What ran when a process died or hung has no line: it
is the gap between the last line before a restart and the first after it, and counts as `down`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.runs.folder import cut_torn_line

START, COMPILE, TRAIN, SAVE, EVALUATE = "start", "compile", "train", "save", "evaluate"

LOST, DOWN, OTHER = "lost", "down", "other"

WORDS = {
    TRAIN: "training steps that count",
    START: "start-up",
    COMPILE: "compiling",
    SAVE: "checkpoint stalls",
    EVALUATE: "evaluation",
    LOST: "steps that were done again",
    DOWN: "from the last line before a restart to the first after it",
    OTHER: "not accounted for",
}

_RECORDED = (START, COMPILE, SAVE, EVALUATE)


@dataclass(frozen=True)
class Interval:
    """One piece of one process's time."""

    kind: str
    begun_s: float
    """Unix time"""
    ended_s: float
    """Unix time"""
    first_step: int | None = None
    """of training: the first of its steps, from 1"""
    last_step: int | None = None
    """of training: the last of its steps, included"""

    @property
    def duration_s(self) -> float:
        """Its length; 0 where a clock went backwards."""
        return max(0.0, self.ended_s - self.begun_s)


class Ledger:
    """Writes a stage's intervals; rank 0 of each start opens it once.

    Steps are gathered in memory and become one line with the next `commit`, with the next other
    interval or on `close`, so that a step costs no write.

    Args:
        path: of the JSON lines file, in the stage's scratch folder.
        warn: gets one line when a torn last line was cut.
        clock: Unix time, for tests.
    """

    def __init__(
        self,
        path: Path,
        warn: Callable[[str], None] | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._steps: list[Interval] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = cut_torn_line(path)
        if torn and warn is not None:
            warn(f"{path.name}: its last line was cut short ({torn} bytes) and is left out")
        self._file = path.open("a", encoding="utf-8")

    @contextlib.contextmanager
    def interval(self, kind: str) -> Iterator[None]:
        """Around a piece of work that is no training step.

        An exception inside is recorded as the same interval: the time was spent.
        """
        assert kind in _RECORDED, kind
        begun_s = self._clock()
        try:
            yield
        finally:
            self._write(*self._taken_steps(), Interval(kind, begun_s, self._clock()))

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one optimizer step, counted from 1; nothing is recorded of one that fails."""
        begun_s = self._clock()
        yield
        self._steps.append(Interval(TRAIN, begun_s, self._clock(), number, number))

    def commit(self) -> None:
        """Write the steps so far and wait for the disk; call it with every checkpoint."""
        self._write(*self._taken_steps())

    def close(self) -> None:
        """Write what is left; nothing may be recorded afterwards."""
        self.commit()
        self._file.close()

    def _taken_steps(self) -> list[Interval]:
        steps, self._steps = self._steps, []
        return joined_steps(steps)

    def _write(self, *intervals: Interval) -> None:
        for interval in intervals:
            values = {key: value for key, value in vars(interval).items() if value is not None}
            self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def joined_steps(steps: Iterable[Interval]) -> list[Interval]:
    """Steps that follow each other as one interval; what lies between two of them goes with them.

    The time between two steps is the loop's own (data, progress, metrics), part of what a step
    costs.
    """
    joined: list[Interval] = []
    for step in steps:
        before = joined[-1] if joined else None
        follows = (
            before and before.last_step is not None and before.last_step + 1 == step.first_step
        )
        if before and follows:
            joined[-1] = Interval(
                TRAIN, before.begun_s, step.ended_s, before.first_step, step.last_step
            )
        else:
            joined.append(step)
    return joined


def read_ledger(path: Path) -> tuple[list[Interval], int]:
    """The intervals of all starts in order of writing, and the bytes of a torn last line.

    Raises:
        ValueError: a line that is not the last is no interval; the file was changed by hand.
    """
    content = path.read_bytes()
    whole, _, torn = content.rpartition(b"\n")
    intervals = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            intervals.append(Interval(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no interval ({error})") from None
    return intervals, len(torn)


def goodput(intervals: list[Interval], begun_s: float, ended_s: float) -> dict[str, Any]:
    """The summary for the record: wall-clock by what it went for, and the share that counts.

    A step counts once, the last time it was done: what was done before a restart and again after it
    is lost. Goodput is the time of the steps that count over the wall-clock time.

    Args:
        intervals: from `read_ledger`; steps of one interval are taken to be of one length.
        begun_s: Unix time at which the stage was started first.
        ended_s: Unix time at which it ended.

    Returns:
        `wall_s`, `goodput` (0 to 1), `num_steps` that count, `num_lost_steps`, `num_starts`, and
        `seconds` by kind: the recorded ones, `lost`, `down` (from a process's last line to the
        next one's first) and `other`; they add up to the wall-clock time.
    """
    wall_s = ended_s - begun_s
    seconds: defaultdict[str, float] = defaultdict(float)
    done: set[int] = set()
    num_lost = 0
    for interval in reversed(intervals):
        if interval.kind != TRAIN:
            seconds[interval.kind] += interval.duration_s
            continue
        assert interval.first_step is not None
        assert interval.last_step is not None
        steps = set(range(interval.first_step, interval.last_step + 1))
        share_lost = len(steps & done) / len(steps)
        seconds[TRAIN] += (1 - share_lost) * interval.duration_s
        seconds[LOST] += share_lost * interval.duration_s
        num_lost += len(steps & done)
        done |= steps
    starts = [i for i, interval in enumerate(intervals) if interval.kind == START]
    for i in starts:
        if i > 0:
            seconds[DOWN] += max(0.0, intervals[i].begun_s - intervals[i - 1].ended_s)
    other_s = wall_s - sum(seconds.values())
    seconds[OTHER] = max(0.0, other_s)
    return {
        "wall_s": wall_s,
        "goodput": seconds[TRAIN] / wall_s if wall_s > 0 else 0.0,
        "num_steps": len(done),
        "num_lost_steps": num_lost,
        "num_starts": len(starts),
        "seconds": {kind: seconds[kind] for kind in WORDS if seconds[kind] > 0},
    }


def goodput_rows(figures: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(words, seconds, share of the wall-clock time) of `goodput`, what counts first, then by size.

    For the terminal and the report; a record of another version may have kinds not known here.
    """
    seconds, wall_s = figures["seconds"], figures["wall_s"]
    order = sorted(seconds, key=lambda kind: (kind != TRAIN, -seconds[kind]))
    return [
        (WORDS.get(kind, kind), seconds[kind], seconds[kind] / wall_s if wall_s else 0.0)
        for kind in order
    ]
