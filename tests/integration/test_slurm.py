"""Runs submitted to a real Slurm of two hosts on this machine: same result, stopped, carried on."""

from __future__ import annotations

import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.slurm_rig import Rig
from tests.integration.slurm_runs import (
    SECRET,
    TWO_HOSTS,
    Submitted,
    files_of,
    jobs,
    rig_of_tests,
    steps_of,
    words_of,
)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_of_tests(tmp_path_factory.getbasetemp()) as started:
        yield started


@pytest.fixture(scope="module")
def words(tiny_model_dir: Path, text_file: Path) -> list[str]:
    return words_of(tiny_model_dir, text_file)


def no_secret_in(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_two_hosts_give_what_one_gives_beside_another_job(
    rig: Rig, words: list[str], tmp_path: Path
) -> None:
    """Two hosts alone; then two jobs of one user at once on one host, each with its own Ray."""
    two = Submitted(rig, tmp_path / "two hosts", [*words, *TWO_HOSTS])
    folder = two.run_dir / ".cluster"
    two.wait_for("the token", (folder / "token").exists, 300)
    token = (folder / "token").read_text()
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert re.search(r"--gpus|WANDB", (folder / "job.sh").read_text()) is None
    two.wait_for("the first stage", lambda: "prune: starting" in two.log)
    shown = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True)
    assert token not in shown.stdout
    assert SECRET not in shown.stdout
    assert "running" in two.manage("status")
    two.wait_for_end()
    assert two.state() == "COMPLETED", two.log
    joined = [(folder / f"{two.record['id']}.ray{node}.log").read_text() for node in (0, 1)]
    assert "Head node started" in joined[0]
    assert "Ray runtime started" in joined[1]
    assert not (folder / "token").exists()
    assert token not in two.log + "".join(joined)
    no_secret_in(two.run_dir)
    assert "finished stages: prune, distill" in two.manage("status")

    shared = ["cluster.slurm.exclusive=false", 'cluster.slurm.extra=["--nodelist=tfn0"]']
    one = [Submitted(rig, tmp_path / name, [*words, *shared]) for name in ("one", "beside")]
    one[0].wait_for("both at once", lambda: all("prune: starting" in job.log for job in one))
    for job in one:
        job.wait_for_end()
        assert job.state() == "COMPLETED", job.log
        assert files_of(job.run_dir) == files_of(two.run_dir)
        assert steps_of(job.run_dir) == steps_of(two.run_dir)


@pytest.mark.slow  # five minutes of waiting for Slurm's timers
def test_time_limit_and_cancel_save_and_nothing_is_repeated(
    rig: Rig, words: list[str], tmp_path: Path
) -> None:
    """A stop by the time limit puts the job back into the queue, one by its user does not."""
    run = Submitted(
        rig, tmp_path / "long",
        [*words, *TWO_HOSTS, "distill.num_tokens=1536000",
         "distill.checkpoint_every_steps=100000", "cluster.slurm.signal_lead_s=60"],
    )  # fmt: skip
    number = run.record["id"]
    run.wait_for("a step", lambda: re.search(r"distill: \d+/3000 steps", run.log))
    shown = rig.slurm("scontrol", "show", "job", "--oneliner", number)
    minutes, seconds = re.search(r"RunTime=00:(\d\d):(\d\d)", shown).groups()
    limit = int(minutes) + 1 + (int(seconds) > 20)
    rig.slurm("scontrol", "update", f"JobId={number}", f"TimeLimit={limit}")
    run.wait_for("the queue again", lambda: run.state() == "PENDING", 400)
    assert f"job {number} goes back into the queue" in run.log
    stopped = [int(step) for step in re.findall(r"stopped after step (\d+) of 3000", run.log)]
    assert "waiting" in run.manage("status")
    # Instead of two minutes later; at once, its hosts would refuse it as the one that was requeued.
    rig.slurm("scontrol", "update", f"JobId={number}", "TimeLimit=30", "StartTime=now+15")

    run.wait_for("its second start", lambda: f"job {number}, attempt 2" in run.log)
    run.wait_for("a later step", lambda: run.log.split("attempt 2")[1].count("/3000 steps"))
    assert "asked to save and stop" in run.manage("cancel")
    run.wait_for_end()
    assert "stopped" in run.manage("status")
    stopped = [int(step) for step in re.findall(r"stopped after step (\d+) of 3000", run.log)]
    assert len(stopped) == 2
    assert stopped[0] < stopped[1]
    assert f"continues after step {stopped[0]} of 3000" in run.log

    assert "submitted: slurm job" in run.manage("resume")
    assert run.record["id"] != number
    run.wait_for_end()
    assert run.state() == "COMPLETED", run.log
    assert f"continues after step {stopped[1]} of 3000" in run.log
    assert steps_of(run.run_dir) == list(range(1, 3001))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["cluster.slurm.partition=nope"], "invalid partition specified: nope"),
        (["cluster.gpus_per_worker=1"], "Requested node configuration is not available; this Slurm "
         "has main: 2 nodes, 8 cores, no GPUs"),
        (["cluster.num_nodes=5", "cluster.num_workers=5", "distill.batch_size=20"],
         "Requested node configuration is not available"),
    ],
)  # fmt: skip
def test_refused_by_slurm(
    rig: Rig, words: list[str], tmp_path: Path, changes: list[str], said: str
) -> None:
    command = [*words, "cluster.kind=slurm", f"run.dir={tmp_path}/run", *changes]
    done = jobs(rig, "prune", *command)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert rig.slurm("squeue", "--noheader") == ""


def test_slurm_reads_quoted_values_as_they_are(rig: Rig, words: list[str], tmp_path: Path) -> None:
    comment = "a \"b\" 'c' $(touch hit) `touch hit` ; # \\ end"
    quoted = comment.replace('"', '\\"')
    run = Submitted(
        rig, tmp_path / "a 'b' \"c\" $(d)",
        [*words, "cluster.num_nodes=2", "cluster.slurm.time=20",
         f'cluster.slurm.extra=["--comment={quoted}","--hold"]'],
    )  # fmt: skip
    shown = rig.slurm("scontrol", "show", "job", run.record["id"])
    lines = [line.strip() for line in shown.splitlines()]
    assert f"Comment={comment}" in lines
    assert f"WorkDir={run.run_dir}/.cluster" in lines
    assert "is cancelled" in run.manage("cancel")
    assert "stopped" in run.manage("status")
