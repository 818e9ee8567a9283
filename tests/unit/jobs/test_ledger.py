"""Where the time went, over kills and restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from jobs.training.ledger import (
    DOWN,
    EVALUATE,
    LOST,
    OTHER,
    SAVE,
    START,
    TRAIN,
    Interval,
    Ledger,
    goodput,
    goodput_rows,
    read_ledger,
)


class Clock:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


def train(ledger: Ledger, clock: Clock, steps: Iterable[int], step_s: float = 2.0) -> None:
    for step in steps:
        with ledger.step(step):
            clock.advance(step_s)


def timed(ledger: Ledger, clock: Clock, kind: str, seconds: float) -> None:
    with ledger.interval(kind):
        clock.advance(seconds)


def test_undisturbed_run_adds_up(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    ledger = Ledger(path, clock=clock)
    timed(ledger, clock, START, 10)
    train(ledger, clock, range(1, 11))
    timed(ledger, clock, SAVE, 3)
    timed(ledger, clock, EVALUATE, 5)
    clock.advance(2)  # nobody's
    train(ledger, clock, range(11, 21))
    ledger.close()
    intervals, torn = read_ledger(path)
    assert torn == 0
    assert [i.kind for i in intervals] == [START, TRAIN, SAVE, EVALUATE, TRAIN]
    figures = goodput(intervals, 1000.0, clock.now_s)
    assert figures["seconds"] == {TRAIN: 40, START: 10, SAVE: 3, EVALUATE: 5, OTHER: 2}
    assert figures["goodput"] == pytest.approx(40 / 60)
    assert (figures["num_steps"], figures["num_lost_steps"], figures["num_starts"]) == (20, 0, 1)
    assert sum(figures["seconds"].values()) == pytest.approx(figures["wall_s"])
    json.dumps(figures, allow_nan=False)


def test_steps_done_again_are_lost_and_the_gap_is_down(tmp_path: Path) -> None:
    """Killed after step 16, of which 11 to 14 had been written; back at the checkpoint of 10."""
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    first = Ledger(path, clock=clock)
    timed(first, clock, START, 10)
    train(first, clock, range(1, 11))
    timed(first, clock, SAVE, 1)
    train(first, clock, range(11, 15))
    first.commit()
    train(first, clock, range(15, 17))  # never written
    clock.advance(6)  # until somebody notices
    second = Ledger(path, clock=clock)
    timed(second, clock, START, 9)
    train(second, clock, range(11, 21))
    second.close()
    figures = goodput(read_ledger(path)[0], 1000.0, clock.now_s)
    assert figures["seconds"] == {TRAIN: 40, START: 19, SAVE: 1, LOST: 8, DOWN: 10}
    assert (figures["num_steps"], figures["num_lost_steps"], figures["num_starts"]) == (20, 4, 2)
    rows = goodput_rows(figures)
    assert rows[0] == ("training steps that count", 40, pytest.approx(40 / 78))
    assert [seconds for _, seconds, _ in rows[1:]] == [19, 10, 8, 1]


def test_rollback_inside_one_process_loses_the_steps(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    ledger = Ledger(path, clock=clock)
    train(ledger, clock, [1, 2, 3, 4, 5, 3, 4, 5, 6])
    ledger.close()
    intervals, _ = read_ledger(path)
    assert [(i.first_step, i.last_step) for i in intervals] == [(1, 5), (3, 6)]
    figures = goodput(intervals, 1000.0, clock.now_s)
    assert figures["seconds"] == {TRAIN: 12, LOST: 6}


def test_failed_step_is_not_recorded_and_a_failed_save_is(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    ledger = Ledger(path, clock=clock)
    train(ledger, clock, [1])
    with pytest.raises(ZeroDivisionError), ledger.step(2):
        raise ZeroDivisionError

    def fill_the_disk() -> None:
        clock.advance(4)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), ledger.interval(SAVE):
        fill_the_disk()
    ledger.close()
    assert read_ledger(path)[0] == [Interval(TRAIN, 1000, 1002, 1, 1), Interval(SAVE, 1002, 1006)]


def test_torn_last_line_is_cut_and_said(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    ledger = Ledger(path, clock=clock)
    timed(ledger, clock, START, 1)
    timed(ledger, clock, SAVE, 1)
    ledger.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert [i.kind for i in read_ledger(path)[0]] == [START]
    assert read_ledger(path)[1] > 0
    said: list[str] = []
    again = Ledger(path, warn=said.append, clock=clock)
    timed(again, clock, SAVE, 1)
    again.close()
    assert len(said) == 1
    assert "cut short" in said[0]
    assert [i.kind for i in read_ledger(path)[0]] == [START, SAVE]


def test_line_changed_by_hand_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"kind": "start"}\n{"kind": "save", "begun_s": 1, "ended_s": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_ledger(path)


def test_clock_that_goes_back_takes_no_time() -> None:
    intervals = [Interval(START, 100, 90), Interval(TRAIN, 90, 100, 1, 5)]
    figures = goodput(intervals, 90, 100)
    assert figures["seconds"] == {TRAIN: 10}
    assert figures["goodput"] == 1.0


def test_committed_steps_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = """
import sys, time
from pathlib import Path
from jobs.training.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for step in (1, 2, 3):
    with ledger.step(step): pass
ledger.commit()
with ledger.step(4): pass
print("now", flush=True)
time.sleep(1000)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=Path(__file__).resolve().parents[3], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=180)
    intervals, torn = read_ledger(path)
    assert torn == 0
    assert [(i.first_step, i.last_step) for i in intervals] == [(1, 3)]
