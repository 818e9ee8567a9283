"""A recovery under Ray that is asked to save, asked to stop, stopped and killed: the same bits."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from jobs.training.checkpoint import finished_steps
from tests.integration.commands import Command, wait_until
from tests.integration.recoveries import BATCH, LENGTH, make_recovery, results, run, train_workers

STEPS = 400
SETTINGS = {"num_tokens": STEPS * BATCH * LENGTH, "checkpoint_every_steps": 10_000}


def train_undisturbed(rank: int, base: Path, out: Path) -> None:
    recovery, _ = make_recovery(base, out, **SETTINGS)
    recovery.train()
    torch.save(results(recovery), out / f"found-{rank}")


class Driver:
    """The command as its user has it before him."""

    def __init__(self, words: list[str], environment: dict[str, str], run_dir: Path) -> None:
        self._metrics = run_dir / "metrics.jsonl"
        folder = run_dir.parent
        self._process = Command("distill", *words, environment=environment, folder=folder)
        self._begun = self.num_steps()

    def num_steps(self) -> int:
        """Steps on record, those done twice counted twice."""
        if not self._metrics.is_file():
            return 0
        return self._metrics.read_text(encoding="utf-8").count("distill/loss")

    def trains(self, so_many: int = 5) -> None:
        """Wait until some more steps are done."""
        before = self.num_steps()
        self.waits_for(lambda: self.num_steps() >= before + so_many)

    def waits_for(self, ready: Callable[[], object]) -> None:
        wait_until(ready, self._process, 600)

    def gets(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def ends(self) -> tuple[int, str]:
        done = self._process.finished(900)
        return done.returncode, done.stderr


def test_whatever_happens_under_ray_it_ends_in_the_same_bits(
    base: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    scratch = run_dir / ".distill.partial/scratch"
    settings: dict[str, Any] = {
        **SETTINGS, "batch_size": BATCH, "micro_batch_size": 2, "learning_rate": 1e-3,
        "num_warmup_steps": 3, "weight_decay": 0.1, "hang_after_s": 40.0,
    }  # fmt: skip
    command = [
        f"run.from={base / 'student'}",
        f"model.teacher={base / 'teacher'}", f"data.train={base / 'rows'}", f"run.dir={run_dir}",
        f"data.sequence_length={LENGTH}", "tracker.wandb=off",
        *(f"distill.{name}={value}" for name, value in settings.items()),
    ]  # fmt: skip

    driver = Driver(command, environment, run_dir)
    driver.trains()
    driver.gets(signal.SIGUSR1)
    driver.waits_for(lambda: finished_steps(scratch))
    driver.trains()
    driver.gets(signal.SIGTERM)
    code, stderr = driver.ends()
    assert code == 75, stderr
    assert "with a checkpoint (SIGTERM asked to stop)" in stderr.splitlines()[-1]
    asked, stopped = finished_steps(scratch)
    assert asked < stopped
    assert f"stopped after step {stopped} of {STEPS}" in stderr

    driver = Driver(command, environment, run_dir)
    driver.trains()
    frozen = train_workers()[0]
    frozen.send_signal(signal.SIGSTOP)
    driver.waits_for(lambda: not frozen.is_running())
    driver.trains()
    train_workers()[-1].kill()
    code, stderr = driver.ends()
    assert code == 0, stderr
    assert "no step for" in stderr, stderr
    assert stderr.count("a worker was lost") == 2, stderr
    assert stderr.count(f"continues after step {stopped} of {STEPS}") == 3

    run(2, train_undisturbed, base, tmp_path)
    expected = torch.load(tmp_path / "found-0")
    record = json.loads((run_dir / "distill/record.json").read_text(encoding="utf-8"))
    assert record["metrics"]["steps"] == expected["curve"]
    warnings = record["metrics"]["warnings"]
    assert any("a worker was lost" in text for text in warnings)
    assert not any("continues after" in text for text in warnings), "shown, but no warning"
    weights = load_file(run_dir / "distill/model/model.safetensors")
    parts = [weights[name].float().numpy().tobytes() for name in sorted(weights)]
    assert hashlib.sha256(b"".join(parts)).hexdigest() == expected["model"]
