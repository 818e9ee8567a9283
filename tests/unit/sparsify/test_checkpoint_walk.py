"""What a walk that continues after a kill writes when: blocks meanwhile, states now and then."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.calibration.checkpoint import CheckpointWalk
from sparsify.calibration.hidden_states import HiddenStateStore, Memory
from sparsify.calibration.timing import PhaseTimer
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows

NUM_BLOCKS, BLOCK_S = 100, 4.0
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Report:
    block: int


class Machine:
    """A clock that goes on by what is done, and notes of what was written."""

    def __init__(self, state_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.states, self.written = 0.0, [], []  # type: ignore[var-annotated]

        def commit(store: HiddenStateStore, block: int) -> None:
            self.states.append((block, self.now_s))
            self.now_s += state_s

        monkeypatch.setattr(HiddenStateStore, "commit", commit)

    def run(self, out: Path, clock: Callable[[], float] | None, killed_at: int = -1) -> Any:
        def walk(store: Any, first: int, finish: Callable[[int, nn.Module], None]) -> None:
            for index in range(first, NUM_BLOCKS):
                if index == killed_at:
                    raise KeyboardInterrupt
                self.now_s += BLOCK_S
                finish(index, nn.Identity())

        def take(index: int, block: nn.Module) -> tuple[list[Report], Callable[[], None]]:
            return [Report(index)], lambda: self.written.append(index)

        rows = TokenRows.whole(torch.zeros(2, 4, dtype=torch.int64))
        walked = CheckpointWalk(
            out, NUM_BLOCKS, rows, Comm.single(), Memory(1), "prune", 1, None, clock
        )
        return walked.run(walk, take, PhaseTimer())


@pytest.mark.parametrize(("state_s", "most_states"), [(0.1, 99), (6.0, 4), (1.0, 20)])
def test_states_take_at_most_a_twentieth_of_the_time(
    state_s: float, most_states: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 s: one of 8.6 GB at 1.5 GB/s, where a block takes 4 s on a GPU."""
    machine = Machine(state_s, monkeypatch)
    assert machine.run(tmp_path, lambda: machine.now_s) == [{"block": i} for i in range(NUM_BLOCKS)]
    assert len(machine.states) <= most_states
    if state_s > 0.25:
        for (_, before_s), (_, after_s) in zip(machine.states, machine.states[1:], strict=False):
            assert 20 * state_s <= after_s - before_s - state_s < 20 * state_s + 2 * BLOCK_S
    else:
        assert len(machine.states) == NUM_BLOCKS - 1


def test_without_a_clock_every_block_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(6.0, monkeypatch)
    machine.run(tmp_path, None)
    assert len(machine.states) == NUM_BLOCKS - 1


def test_what_came_after_the_last_state_is_done_again_and_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(6.0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        machine.run(tmp_path, lambda: machine.now_s, killed_at=60)
    (last, _), machine.written = machine.states[-1], []
    monkeypatch.setattr(HiddenStateStore, "restore", lambda *_: None)
    reports = machine.run(tmp_path, lambda: machine.now_s)
    assert 1 < last < 60
    assert machine.written == list(range(last, NUM_BLOCKS))
    assert reports == [{"block": i} for i in range(NUM_BLOCKS)]


class Blocks:
    """A walk of blocks whose writing waits until it may, and notes of what happened."""

    def __init__(self, num_blocks: int, every: int) -> None:
        self.num_blocks, self.every, self.may_write = num_blocks, every, threading.Semaphore(0)
        self.written: list[int] = []
        self.solved: list[int] = []

    def run(self, out: Path, at_block: Callable[[int], None]) -> None:
        def walk(store: Any, first: int, finish: Callable[[int, nn.Module], None]) -> None:
            for index in range(first, self.num_blocks):
                at_block(index)
                self.solved.append(index)
                finish(index, nn.Identity())

        def take(index: int, block: nn.Module) -> tuple[list[Report], Callable[[], None]]:
            def write() -> None:
                assert threading.current_thread() is not threading.main_thread()
                if not self.may_write.acquire(timeout=PATIENCE_S):
                    raise TimeoutError
                if index == 3:
                    raise OSError("the disk is full")
                self.written.append(index)

            return [Report(index)], write

        rows = TokenRows.whole(torch.zeros(2, 4, dtype=torch.int64))
        walked = CheckpointWalk(
            out, self.num_blocks, rows, Comm.single(), Memory(1), "prune", self.every
        )
        walked.run(walk, take, PhaseTimer())

    def said(self, out: Path) -> int:
        """Blocks that the state says are done."""
        path = out / "progress.json"
        return int(json.loads(path.read_text())["num_done"]) if path.exists() else 0


def test_a_block_is_written_while_the_next_is_solved_and_before_a_state_says_so(
    tmp_path: Path,
) -> None:
    blocks = Blocks(3, every=2)

    def at_block(index: int) -> None:
        assert blocks.said(tmp_path) in (0, 2)
        assert set(range(blocks.said(tmp_path))) <= set(blocks.written)
        if index == 1:
            assert blocks.written == [], "block 0 is being written still"
            blocks.may_write.release(2)
        elif index == 2:
            blocks.may_write.release()

    blocks.run(tmp_path, at_block)
    assert blocks.written == [0, 1, 2] and blocks.said(tmp_path) == 3


def test_writing_that_fails_ends_the_walk_at_the_next_block(tmp_path: Path) -> None:
    """The state does not say that the block is there, and the walk does it again."""
    blocks = Blocks(9, every=100)
    with pytest.raises(OSError, match="the disk is full"):
        blocks.run(tmp_path, lambda _: blocks.may_write.release())
    assert blocks.solved == [0, 1, 2, 3, 4] and blocks.written == [0, 1, 2]
    assert blocks.said(tmp_path) == 0
    last = Blocks(4, every=100)
    with pytest.raises(OSError, match="the disk is full"):
        last.run(tmp_path, lambda _: last.may_write.release())
    assert last.said(tmp_path) == 0
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("finished block") for name in names)
