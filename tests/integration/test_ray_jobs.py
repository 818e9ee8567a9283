"""Commands as jobs of a Ray that runs already: streamed, left alone, found again, cancelled."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def words(small: list[str], tmp_path: Path) -> list[str]:
    return [
        *small, "prune.baselines=[]", "prune.rotation_steps=2", "cluster.kind=ray",
        "cluster.num_workers=1", f"run.dir={tmp_path}/run",
    ]  # fmt: skip


def start(environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *words], env={**environment, "WANDB_API_KEY": "not-to-be-shipped"},
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out + err


def test_streamed_to_the_end(environment, words: list[str], tmp_path: Path) -> None:
    """Its second stage has workers of another size, for which the job joins the Ray again."""
    words = [*words, "stages=[prune,export]", "cluster.stages.export.cpus_per_worker=0.5"]
    said = finished(start(environment, "jobs.prune", *words))
    assert "submitted: ray job twofour-" in said
    assert "prune: starting" in said
    assert str(tmp_path / "run") in said.splitlines()
    assert (tmp_path / "run" / "export" / "record.json").exists()
    status = finished(start(environment, "jobs.manage", "status", str(tmp_path / "run")))
    assert "done (succeeded" in status
    assert "finished stages: prune, export" in status
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"not-to-be-shipped" not in path.read_bytes()


def test_goes_on_without_its_terminal_and_is_cancelled(
    environment, words: list[str], tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    process = start(
        environment, "jobs.prune", *words, "stages=[prune,distill]",
        "distill.num_tokens=1024000", "distill.checkpoint_every_steps=100000",
    )  # fmt: skip
    assert process.stdout is not None
    while not re.search(r"distill: \d+/2000 steps", process.stdout.readline()):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = finished(process)
    assert "goes on: python -m jobs.manage logs" in said
    assert "running" in finished(start(environment, "jobs.manage", "status", run_dir))
    assert "asked to save and stop" in finished(
        start(environment, "jobs.manage", "cancel", run_dir)
    )
    deadline = time.monotonic() + 120
    while "running" in (status := finished(start(environment, "jobs.manage", "status", run_dir))):
        assert time.monotonic() < deadline
    assert "stopped" in status
    logs = finished(start(environment, "jobs.manage", "logs", run_dir))
    assert "with a checkpoint" in logs


@pytest.mark.parametrize(
    ("address", "said"),
    [(None, "cluster.kind=ray needs RAY_ADDRESS"), ("http://127.0.0.1:9", "Ray at http://127")],
)
def test_no_ray_is_one_line(
    environment, words: list[str], tmp_path: Path, address: str | None, said: str
) -> None:
    told = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
    told |= {"RAY_ADDRESS": address} if address else {}
    error = finished(start(told, "jobs.prune", *words), 2)
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / ".cluster" / "job.json").exists()
    assert json.dumps(os.listdir(tmp_path)) in ('["run"]', "[]")
