"""`python -m jobs.forecast RUN`: from the files of a run in progress, and of a finished one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from conf.options.distill import DistillConfig
from jobs.forecast import forecast_run, main, rates_of
from jobs.training.schedule import planned_rates
from sparsify.training.schedule import learning_rate
from tests.conftest import stage_record

NUM_STEPS = 120


def settings() -> dict[str, Any]:
    distill = DistillConfig(num_tokens=NUM_STEPS * 16 * 32, batch_size=16, num_warmup_steps=10)
    return {"distill": asdict(distill), "data": {"sequence_length": 32}}


def curve(step: int) -> float:
    return 0.4 * (step + 5) ** -0.5


def in_progress(run_dir: Path, num_done: int) -> None:
    """Killed once at step 40, back to step 31 with other values; the last line is being written."""
    partial = run_dir / ".distill.partial"
    partial.mkdir(parents=True)
    identity = {"config": settings(), "inputs": {}}
    (partial / "begun.json").write_text(json.dumps({"identity": identity, "redo": False}))
    lines = [{"step": 1, "prune/relative_error": 0.1}]
    lines += [{"step": step, "distill/kl": 9.0} for step in range(1, 41)]
    lines += [{"step": step, "distill/kl": curve(step)} for step in range(1, 41)]
    lines += [{"step": step, "distill/kl": curve(step)} for step in range(31, num_done + 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + '{"step": 999, "distill/kl": 0.')


def finished(run_dir: Path) -> None:
    steps = [{"step": step, "kl": curve(step), "ce": 0.0} for step in range(1, NUM_STEPS + 1)]
    record = stage_record(identity={"config": settings()}, metrics={"steps": steps})
    (run_dir / "distill").mkdir(parents=True)
    (run_dir / "distill" / "record.json").write_text(record)


def test_rates_of_are_those_of_the_training() -> None:
    config = DistillConfig(**settings()["distill"])
    assert rates_of(settings()) == planned_rates(config, NUM_STEPS)


def test_rates_warm_up_to_the_peak_and_fall_to_their_share_of_it() -> None:
    rates = [learning_rate(2.0, step, 10, 4, 0.1) for step in range(10)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(2.0 * (0.1 + 0.9 / 6))
    config = DistillConfig(learning_rate=2.0, num_warmup_steps=400, min_learning_rate_share=0.1)
    assert planned_rates(config, 4) == rates[:4], "a warm-up longer than the run is as long as it"


def test_run_in_progress_and_finished_run_say_the_same(tmp_path: Path) -> None:
    in_progress(tmp_path / "live", 60)
    finished(tmp_path / "done")
    live = forecast_run(tmp_path / "live", "kl", 0.8, None)
    assert (live.last_step, live.num_steps, live.num_points) == (60, NUM_STEPS, 50)
    assert live == forecast_run(tmp_path / "done", "kl", 0.8, 0.5)


def test_sentence_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path)
    assert main([str(tmp_path), "--share", "0.5"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("final KL 0.0")
    assert "(80 %: 0.0" in line
    assert "at 50 % (60 of 120 steps)" in line
    assert main([str(tmp_path), "--share", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_points"] == 50
    assert main([str(tmp_path), "--share", "0.1"]) == 0
    assert capsys.readouterr().out.startswith("no forecast at 10 %")


def test_wrong_folder_metric_and_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "run")
    for arguments, said in (
        ([str(tmp_path)], "no recovery in this folder"),
        ([str(tmp_path / "run"), "--metric", "ce"], "have no ce"),
        ([str(tmp_path / "run"), "--share", "2"], "--share 2.0"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    record = tmp_path / "run" / "distill" / "record.json"
    for content in (record.read_text()[:40], "{}", stage_record(identity={"config": 1})):
        record.write_text(content)
        assert main([str(tmp_path / "run")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
