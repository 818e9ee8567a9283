"""The recovery's clock: its beginning over restarts, and steps without figures."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf.options.distill import DistillConfig
from jobs.training.pace import Pace, forecast_of


def worker(rank: int, said: list[Any]) -> Any:
    return SimpleNamespace(
        name="distill", rank=rank, world_size=2, device="cpu", warn=said.append,
        progress=lambda *args: said.append(args), metrics=lambda *args: said.append(args),
    )  # fmt: skip


def test_the_beginning_is_the_first_starts_and_only_rank_0_looks_for_it(tmp_path: Path) -> None:
    settings = DistillConfig()
    (tmp_path / "begun").touch()  # as another worker may see it
    Pace(worker(1, []), settings, tmp_path, 8)
    (tmp_path / "begun").unlink()
    first = Pace(worker(0, []), settings, tmp_path, 8).begun_s
    assert Pace(worker(0, []), settings, tmp_path, 8).begun_s == first
    assert not list(tmp_path.glob(".begun*"))


def test_a_step_without_a_loss_is_said_and_not_forecast_from(tmp_path: Path) -> None:
    said: list[Any] = []
    pace = Pace(worker(0, said), DistillConfig(), tmp_path, 8)
    with pace.step(1):
        pass
    figures = {"step": 1, "loss": None, "kl": None, "row_crc": 1, "is_skipped": True}
    pace.say(1, 4, figures, 0.0)
    (_, _, text), (metrics, _) = said
    assert text.startswith("steps, loss not finite")
    assert "distill/loss" not in metrics
    curve = [figures, *({**figures, "step": n, "kl": 1 / n, "is_skipped": False} for n in (2, 3))]
    assert (
        forecast_of(curve, [1e-3] * 10).as_dict() == forecast_of(curve[1:], [1e-3] * 10).as_dict()
    )


def test_goodput_is_the_time_in_steps_that_count_over_all_since_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now_s=5000.0)
    monkeypatch.setattr(time, "time", lambda: clock.now_s)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now_s - 1000)
    figures = {"step": 1, "loss": 1.0, "kl": 1.0, "row_crc": 1, "is_skipped": False}

    def told(pace: Pace, number: int, step_s: float) -> float:
        with pace.step(number):
            clock.now_s += step_s
        said.clear()
        pace.say(number, 9, figures, 0.0)
        return said[-1][0]["distill/goodput"]

    said: list[Any] = []
    pace = Pace(worker(0, said), DistillConfig(), tmp_path, 8)
    clock.now_s += 10  # start-up
    assert told(pace, 1, 5.0) == pytest.approx(5 / 15)
    assert told(pace, 2, 15.0) == pytest.approx(20 / 30)
    clock.now_s += 10  # killed, and a new process; step 2 was not saved
    pace = Pace(worker(0, said), DistillConfig(), tmp_path, 8)
    pace.resumed(1, 5.0)
    assert told(pace, 2, 10.0) == pytest.approx(15 / 50)
