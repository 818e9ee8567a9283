"""How often a walk that continues after a kill writes its state: by what the writing takes."""

from __future__ import annotations

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

        def write(index: int, block: nn.Module) -> list[Report]:
            self.written.append(index)
            return [Report(index)]

        rows = TokenRows.whole(torch.zeros(2, 4, dtype=torch.int64))
        walked = CheckpointWalk(
            out, NUM_BLOCKS, rows, Comm.single(), Memory(1), "prune", 1, None, clock
        )
        return walked.run(walk, write, PhaseTimer())


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
