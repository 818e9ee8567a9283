"""Metrics reach the JSONL file whatever happens to Weights & Biases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from conf.options.tracker import TrackerConfig
from jobs.runs.tracking import (
    METRICS_FILE,
    JsonlTracker,
    has_wandb_credentials,
    open_tracker,
    wandb_mode,
)

ROOT = Path(__file__).parents[3]
SECRET = "0123456789abcdef" * 2 + "01234567"  # has the length of a key


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- JSONL


def test_line_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"loss": 1.5, "stage": "distill", "done": True}, step=3)
    tracker.log({"num_tokens": 7})
    first, second = lines(path)
    tracker.close()
    assert first.pop("time_s") <= second.pop("time_s")
    assert first == {"step": 3, "loss": 1.5, "stage": "distill", "done": True}
    assert second == {"num_tokens": 7}


def test_tensors_become_numbers_and_non_finite_stays_valid_json(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"a": torch.tensor(0.25), "b": float("nan"), "c": -float("inf"), "d": None})
    tracker.close()
    (record,) = lines(path)
    del record["time_s"]
    assert record == {"a": 0.25, "b": "nan", "c": "-inf", "d": None}


def test_reopening_appends_and_cuts_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    tracker = JsonlTracker(path)
    tracker.log({}, step=2)
    tracker.close()
    assert [record["step"] for record in lines(path)] == [1, 2]


# --- what auto means


def test_auto_is_offline_without_credentials_and_online_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert wandb_mode("auto") == "offline"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password x\n", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "off"
    assert wandb_mode("online") == "online"  # what is asked for wins over the environment


def test_broken_netrc_is_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine\n\x00 what", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(netrc))
    assert not has_wandb_credentials()


# --- Weights & Biases fails


class FakeRun:
    """A run of a fake wandb whose calls fail when their names are in `failing`."""

    def __init__(self, failing: tuple[str, ...], calls: list[str]) -> None:
        self._failing = failing
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> FakeRun:
            self._calls.append(name)
            if name in self._failing:
                raise OSError(f"{name} failed\nfor a reason")
            return self

        return call


@pytest.mark.parametrize("failing", ["setup", "init", "define_metric", "log", "finish"])
def test_wandb_failure_is_one_warning_and_tracking_goes_on(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fake = FakeRun((failing,), calls)
    module = types.SimpleNamespace(setup=fake.setup, init=fake.init, Settings=lambda **kw: kw)
    monkeypatch.setitem(sys.modules, "wandb", module)
    warnings: list[str] = []
    config = TrackerConfig(wandb="offline")
    tracker = open_tracker(config, tmp_path, "name", {"a": 1}, warnings.append)
    for step in range(3):
        tracker.log({"loss": 0.5}, step)
    tracker.close()
    assert [record["step"] for record in lines(tmp_path / METRICS_FILE)] == [0, 1, 2]
    assert len(warnings) == 1
    assert "\n" not in warnings[0]
    assert f"{failing} failed for a reason" in warnings[0]
    assert calls.count(failing) == 1


def test_wandb_not_installed_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = open_tracker(TrackerConfig(wandb="offline"), tmp_path, "name", {})
    tracker.log({"loss": 1.0})
    tracker.close()
    assert len(lines(tmp_path / METRICS_FILE)) == 1
    assert capsys.readouterr().err.count("warning: ") == 1


def test_online_without_a_key_warns_and_never_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would be a second warning
    warnings: list[str] = []
    open_tracker(TrackerConfig(wandb="online"), tmp_path, "name", {}, warnings.append).close()
    assert len(warnings) == 1
    assert "WANDB_API_KEY" in warnings[0]


def test_off_never_imports_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    open_tracker(TrackerConfig(wandb="off"), tmp_path, "name", {}, warnings.append).close()
    assert warnings == []
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


# --- the real thing, offline

ARGUMENT = "argument-that-stays-here"
SCRIPT = """
import sys
from pathlib import Path
from conf.options.tracker import TrackerConfig
from conf.schema import Config, to_dict
from jobs.runs import tracking
tracking._INIT_TIMEOUT_S = 2  # seconds spared; the rule is the same
config = TrackerConfig(wandb=sys.argv[2])
tracker = tracking.open_tracker(config, Path(sys.argv[1]), "a-run", to_dict(Config()))
tracker.log({"loss": 1.25}, step=1)
tracker.log({"loss": 1.0}, step=1)
tracker.close()
"""


def run_script(run_dir: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = run_dir.parent / "script.py"  # wandb records the arguments of files only
    script.write_text(SCRIPT, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(script), str(run_dir), mode, ARGUMENT],
        cwd=ROOT, env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def test_offline_run_is_made_in_the_run_folder_silently_and_without_secrets(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    result = run_script(run_dir, "offline", WANDB_API_KEY=SECRET)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    (record,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"a-run" in content
    assert b"1.25" in content
    for path in run_dir.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
            assert ARGUMENT.encode() not in path.read_bytes(), path
    assert len(lines(run_dir / METRICS_FILE)) == 2


def test_unreachable_server_costs_seconds_and_one_warning(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = run_script(run_dir, "auto", WANDB_API_KEY=SECRET, WANDB_BASE_URL="http://127.0.0.1:9")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("warning: Weights & Biases is left out")
    assert SECRET not in result.stderr
    assert len(lines(run_dir / METRICS_FILE)) == 2
