"""Sweeps: submitted as arrays, several at once on this machine, and jobs.manage of all of one."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import launch
from cluster.kinds import get_kind
from cluster.kinds._base import Job
from cluster.kinds.local import visible_gpus
from cluster.preempt import Interrupted
from jobs import manage
from jobs.cli import submit, sweep
from jobs.cli.command import find_command
from jobs.cli.main import main
from sparsify.errors import InputError, NonFiniteError, StoppedEarlyError

SLURM = ["+cluster=slurm-h100x32", "data.sequence_length=256"]
SEEDS = ["-m", "run.seed=0,1,2", "hydra.sweep.subdir='${run.seed}'", "run.dir=s"]


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TWOFOUR_SUBMITTED", raising=False)
    return tmp_path


@pytest.fixture
def programs(away: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put programs of these texts on PATH; what they are called with is in the file `calls`."""
    (away / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{away}/bin:/bin:/usr/bin")

    def make(**texts: str) -> None:
        for name, text in texts.items():
            path = away / "bin" / name
            path.write_text(f'#!/bin/sh\necho {name} "$@" >>{away}/calls\n{text}\n')
            path.chmod(0o755)

    return make


def calls(away: Path, name: str) -> list[str]:
    lines = (away / "calls").read_text().splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def run(*argv: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["jobs.prune", *argv])
        with pytest.raises(SystemExit) as end:
            main(find_command("prune"))
    return int(end.value.code or 0)


# --- Slurm


def test_sweep_is_one_array(
    away: Path, programs: Any, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    programs(sbatch="echo 40", scontrol="echo JobState=PENDING Reason=Priority", scancel="")
    assert run(*SLURM, *SEEDS, "cluster.sweep_jobs=2") == 0
    said = capsys.readouterr().out
    assert calls(away, "sbatch") == [
        f"--test-only --array=0-2%2 {away}/s/.cluster/job.sh",
        f"--parsable --export=ALL --array=0-2%2 {away}/s/.cluster/job.sh",
    ]
    assert f"submitted: 3 runs of the sweep {away}/s\n  slurm job 40_0  0\n" in said
    for seed in range(3):
        assert f"  seed: {seed}\n" in (away / f"s/{seed}/.cluster/config.yaml").read_text()
        record = json.loads((away / f"s/{seed}/.cluster/job.json").read_text())
        assert record["typed"].endswith(f"run.dir=s/{seed}")
        assert f"run.seed={seed}" in record["typed"]
    plan = json.loads((away / "s/sweep.json").read_text())
    assert [entry["folder"] for entry in plan["runs"]] == ["0", "1", "2"]
    assert shlex.split(plan["command"])[:3] == ["python", "-m", "jobs.prune"]

    assert manage.main(["status", "s"]) == 0
    said = capsys.readouterr().out
    assert said.count("waiting  pending: Priority") == 3
    assert said.endswith("3 waiting\n")
    assert manage.main(["logs", "s"]) == 2
    assert "is a sweep of 3 runs; name one, such as " in capsys.readouterr().err
    # Waiting ones are cancelled before the one that runs, whose end would let them begin.
    running = 'case "$5$4$3" in *40_0*) echo JobState=RUNNING;; *) echo JobState=PENDING;; esac'
    programs(scontrol=running)
    assert manage.main(["cancel", "s"]) == 0
    assert calls(away, "scancel") == ["40_1", "40_2", "--batch --signal=USR2 40_0"]

    ended = 'case "$4" in *_1) echo JobState=COMPLETED;; *) echo JobState=CANCELLED;; esac'
    programs(scontrol=ended, sbatch="echo 50")
    assert manage.main(["cancel", "s"]) == 0
    assert "all of its runs have ended already" in capsys.readouterr().out
    assert manage.main(["resume", "s"]) == 0
    assert "submitted: 2 runs of the sweep s\n" in capsys.readouterr().out
    assert "--array=0,2%2" in calls(away, "sbatch")[-1]
    assert [launch.find_job(away / "s" / str(seed)).id for seed in range(3)] == [
        "50_0", "40_1", "50_2",
    ]  # fmt: skip
    programs(scontrol="echo JobState=COMPLETED")
    assert manage.main(["resume", "s"]) == 0
    assert "all of its runs are done, or still there" in capsys.readouterr().out


def test_dry_run_shows_one_script_and_writes_nothing(
    away: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SLURM, *SEEDS, "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count("#!/bin/bash") == 1
    assert "\n#SBATCH --array=0-2\n" in said
    assert f"\n    [2]={away}/s/2\n" in said
    assert "--dry-run" not in said.split("#!/bin/bash")[1]
    assert list(away.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.kind=slurm,local"], "cluster.kind=local,slurm: all runs of a sweep go to one"),
        (["run.seed=0,1", "hydra.sweep.subdir=x"], "two runs of the sweep would write there"),
        (["prune.method=wanda,wandu"], "1 of the sweep's runs are refused, see above; none was"),
        (["cluster.kind=kuberay", "cluster.sweep_jobs=2"], "kuberay takes runs one by one"),
        (["cluster.sweep_jobs=0"], "cluster.sweep_jobs=0: must be at least 1"),
        (["run.seed=0,1", "model.path=/none"], "/none: there is no such folder"),
        (["run.seed=0,1", "run.dir=100%"], "choose another run.dir"),
    ],
)
def test_mistakes_are_said_before_anything_is_submitted(
    away: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run(*SLURM, "-m", *words) == 2
    assert said in capsys.readouterr().err
    assert list(away.rglob("job.*")) == []


# --- several at once


class Machine:
    """Commands in the place of runs: each notes what it saw and when, and ends as it is told."""

    CODE = """
import json, os, pathlib, signal, sys, time
folder, code = pathlib.Path(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: (print("error: stopped"), sys.exit(75)))
(folder / "seen").write_text(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), time.time()]))
for _ in range(int(sys.argv[3])):
    time.sleep(0.1)
if code:
    print("error: what went wrong")
(folder / "end").write_text(str(time.time()))
sys.exit(code)
"""

    def __init__(self, folder: Path) -> None:
        self.folder, self.codes, self.tenths = folder, {}, 5

    def job_of(self, command: Any, config: Any, words: list[str]) -> Job:
        job = JOB_OF(command, config, words)
        code = str(self.codes.get(job.name, 0))
        told = ("-c", self.CODE, job.run_dir, code, str(self.tenths))
        return Job(**{**vars(job), "command": told})

    def seen(self, name: str) -> tuple[str | None, float, float]:
        shown, begun = json.loads((self.folder / name / "seen").read_text())
        return shown, begun, float((self.folder / name / "end").read_text())


JOB_OF = submit.job_of


@pytest.fixture
def machine(away: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(away / "s")
    monkeypatch.setattr(submit, "job_of", found.job_of)
    monkeypatch.setattr(sweep, "_POLL_S", 0.05)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return found


def test_several_at_once_and_one_that_fails_hides_no_other(
    machine: Machine, away: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.codes = {"1": 1}
    assert run(*SEEDS, "cluster.sweep_jobs=2", "cluster.num_workers=1") == 1
    told = capsys.readouterr()
    spans = [machine.seen(str(seed)) for seed in range(3)]
    assert [shown for shown, _, _ in spans] == [None] * 3
    assert spans[1][1] < spans[0][2]  # two at once
    assert spans[2][1] > min(spans[0][2], spans[1][2])  # the third when one has ended
    assert "1: failed (exit code 1): error: what went wrong\n" in told.out
    assert "0: done\n" in told.out
    assert told.err.startswith("error: 1 run of the sweep failed, see above; the same command")
    found = json.loads((away / "s" / "compare.json").read_text())
    assert [run["state"] for run in found["runs"]] == ["done", "failed", "done"]
    assert manage.main(["status", "s"]) == 0
    said = capsys.readouterr().out
    assert "2 done, 1 failed\ncarry on with: python -m jobs.manage resume s\n" in said
    machine.codes = {"0": 2, "1": 2}
    assert run(*SEEDS, "cluster.sweep_jobs=3", "cluster.num_workers=1") == 2
    machine.codes = {"0": 75}
    assert run(*SEEDS, "cluster.sweep_jobs=3", "cluster.num_workers=1") == 75


def test_each_sees_gpus_of_its_own(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,GPU-7")
    words = ["cluster.gpus_per_worker=1", "cluster.num_workers=1", "cluster.sweep_jobs=8"]
    assert run(*SEEDS, *words) == 0
    assert "3 runs, at most 8 at a time, on 3 GPUs\n" in capsys.readouterr().out
    assert {machine.seen(str(seed))[0] for seed in range(3)} == {"3", "5", "GPU-7"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5,GPU-7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    words[1] = "cluster.num_workers=2"  # one run at a time, though eight may
    assert run(*SEEDS, *words) == 0
    spans = sorted(machine.seen(str(seed)) for seed in range(3))
    spans.sort(key=lambda span: span[1])
    assert all(first[2] <= second[1] for first, second in itertools.pairwise(spans))
    assert all(len(set(shown.split(","))) == 2 for shown, _, _ in spans)
    words[1:2] = ["cluster.num_workers=4", "distill.batch_size=32"]
    assert run(*SEEDS, *words) == 2
    assert "a run of the sweep needs as many GPUs, this machine has 3" in capsys.readouterr().err


def test_gpus_of_this_machine(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", os.environ["PATH"].split(":")[0])
    assert visible_gpus() == []
    programs(**{"nvidia-smi": "echo 'GPU 0: H (UUID: x)'; echo ' MIG 1g'; echo 'GPU 1: H'"})
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/bin")
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 75)])
def test_a_signal_stops_all_of_them(
    machine: Machine, away: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    machine.tenths = 600
    kill, sent = os.kill, []

    def sleep(seconds: float) -> None:
        real_sleep(seconds)
        if not sent and len(list((away / "s").glob("*/seen"))) == 2:
            sent.append(number)
            kill(os.getpid(), number)

    real_sleep = time.sleep
    monkeypatch.setattr(sweep.time, "sleep", sleep)
    assert run(*SEEDS, "cluster.sweep_jobs=2", "cluster.num_workers=1") == code
    kind = get_kind("local")
    states = [kind.status(launch.find_job(away / "s" / name)) for name in ("0", "1")]
    assert [(status.state, status.exit_code) for status in states] == [("stopped", 75)] * 2
    assert not (away / "s" / "2").exists()
    assert manage.main(["status", "s"]) == 0
    assert "resume s" in capsys.readouterr().out
    assert kind.status(launch.find_job(away / "s")).exit_code == code
    machine.tenths = 1
    monkeypatch.setattr(sweep.time, "sleep", real_sleep)
    assert run(*SEEDS, "cluster.sweep_jobs=2", "cluster.num_workers=1") == 0


# --- one after another, and what is kept of how a command ended


def test_in_turn_ends_with_a_table_and_misses_no_run(
    away: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_pipeline(config: Any, job: str) -> Path:
        folder = Path(config.run.dir)
        with submit.remembered_here(folder, job, f"python -m jobs.prune a={folder}", print):
            if config.run.seed == 1:
                raise NonFiniteError("NaN")
            if config.run.seed == 2:
                assert get_kind("local").status(launch.find_job(away / "s/1")).state == "failed"
                assert get_kind("local").status(launch.find_job(away / "s/2")).state == "running"
                raise StoppedEarlyError("saved")
        return folder

    monkeypatch.setattr("jobs.pipeline.run_pipeline", run_pipeline)
    words = [word.replace("0,1,2", "0,1,2,3") for word in SEEDS]
    assert run(*words) == 75
    assert re.search(r"(?m)^3 +not started", capsys.readouterr().out)
    found = json.loads((away / "s" / "compare.json").read_text())
    assert [run["state"] for run in found["runs"]] == ["done", "failed", "stopped", "not started"]
    assert [run["exit_code"] for run in found["runs"]] == [0, 1, 75, None]
    assert manage.main(["cancel", "s"]) == 0
    assert "have ended already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (None, "done", 0), (InputError("x"), "failed", 2), (NonFiniteError("x"), "failed", 1),
        (StoppedEarlyError("x"), "stopped", 75), (KeyboardInterrupt(), "stopped", 130),
        (Interrupted(signal.SIGTERM), "stopped", 75), (RuntimeError("x"), "failed", 1),
    ],
)  # fmt: skip
def test_how_a_command_at_a_terminal_ended(
    away: Path, error: BaseException | None, state: str, code: int
) -> None:
    def work() -> None:
        with submit.remembered_here(away / "run", "prune", "python -m jobs.prune", print):
            assert get_kind("local").status(launch.find_job(away / "run")).state == "running"
            if error is not None:
                raise error

    for _ in range(2):  # the second forgets how the first ended
        if error is None:
            work()
        else:
            with pytest.raises(type(error)):
                work()
    status = get_kind("local").status(launch.find_job(away / "run"))
    assert (status.state, status.exit_code) == (state, code)
