"""Layers dropped by the command: killed between two choices, continued, loaded elsewhere."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import transformers

from tests.integration.commands import Command, wait_until
from tests.integration.conftest import Run


def test_killed_between_two_choices_and_continued(
    run_job: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    words = (
        f"run.dir={tmp_path / 'run'}", "model.path=embedded", "drop.rule=greedy",
        "drop.num_layers=2", "drop.num_rows=64", "data.sequence_length=128", "tracker.wandb=off",
        "cluster.executor=plain",
    )  # fmt: skip
    killed = Command("drop", *words, environment=environment, folder=tmp_path)
    rounds = tmp_path / "run/.drop.partial/scratch/rounds.json"
    wait_until(rounds.is_file, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(60)
    first = json.loads(rounds.read_bytes())
    assert len(first) == 1
    assert not (tmp_path / "run/drop").exists()
    done = run_job("drop", *words)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run/drop/record.json").read_bytes())["metrics"]
    assert metrics["rounds"][0] == first[0], "the first round was not done again"
    assert [len(one["candidates"]) for one in metrics["rounds"]] == [4, 3]
    assert (metrics["num_layers"], len(metrics["kept_layers"])) == (2, 2)
    assert (tmp_path / "run/drop/chart.svg").read_text().startswith("<svg ")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/drop/model")
    assert model.num_parameters() == metrics["num_weights"]
