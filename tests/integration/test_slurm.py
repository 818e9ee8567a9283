"""Runs submitted to a real Slurm of two hosts on this machine: same result, stopped, carried on."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import slurm_rig
from tests.integration.slurm_rig import Rig

REPOSITORY = Path(__file__).resolve().parents[2]

SECRET = "wandb-key-that-nobody-may-see"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    reason = slurm_rig.why_not()
    if reason is not None:
        if os.environ.get("TWOFOUR_NEED_SLURM") == "1":
            pytest.fail(f"the tests on Slurm cannot run: {reason}")
        pytest.skip(f"no two-host Slurm: {reason}")
    # What hosts have on a shared disk: the tests' folders, and the project where that is in /tmp.
    shared = [tmp_path_factory.getbasetemp()]
    shared += [path for path in (REPOSITORY,) if path.is_relative_to("/tmp")]
    with slurm_rig.running(shared) as started:
        started.environment |= {
            "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WANDB_API_KEY": SECRET,
        }  # fmt: skip
        yield started


def jobs(rig: Rig, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{command}", *words], env=rig.environment, cwd=REPOSITORY,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


class Submitted:
    """A run that `jobs.prune` has submitted."""

    def __init__(self, rig: Rig, run_dir: Path, words: list[str]) -> None:
        self.rig, self.run_dir = rig, run_dir
        done = jobs(rig, "prune", *words, "cluster.kind=slurm", f"run.dir={run_dir}")
        assert done.returncode == 0, done.stderr
        assert "submitted: slurm job" in done.stdout
        self.shown = done.stdout

    @property
    def record(self) -> dict:
        return json.loads((self.run_dir / ".cluster" / "job.json").read_text())

    @property
    def log(self) -> str:
        path = self.run_dir / ".cluster" / f"{self.record['id']}.log"
        return path.read_text() if path.exists() else ""

    def manage(self, action: str, *words: str) -> str:
        done = jobs(self.rig, "manage", action, str(self.run_dir), *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state(self) -> str:
        shown = self.rig.slurm("scontrol", "show", "job", "--oneliner", self.record["id"])
        return re.search(r"JobState=(\S+)", shown)[1]

    def wait_for(self, what: str, is_there, seconds: float = 600) -> None:
        def is_there_or_lost() -> bool:
            if found := is_there():
                return bool(found)
            assert self.state() not in ("FAILED", "CANCELLED", "TIMEOUT"), f"{what}\n{self.log}"
            return False

        try:
            self.rig.wait_for(what, is_there_or_lost, seconds)
        except TimeoutError as error:
            pytest.fail(f"{error}\n{self.log}")

    def wait_for_end(self) -> None:
        self.wait_for("the job's end", lambda: self.state() not in ("PENDING", "RUNNING"), 900)
        self.wait_for("its processes' end", lambda: self.state() != "COMPLETING", 120)


@pytest.fixture(scope="module")
def words(tiny_model_dir: Path, text_file: Path) -> list[str]:
    return [
        f"model.path={tiny_model_dir}", f"data.calibration={text_file}", "data.sequence_length=64",
        "stages=[prune,distill]", "prune.num_samples=8", "prune.baselines=[]",
        "prune.rotation_steps=2", "distill.num_tokens=8192", "distill.batch_size=8",
        "distill.micro_batch_size=4", "tracker.wandb=off",
        "cluster.num_workers=2", "cluster.start_timeout_s=240", "cluster.slurm.time=30",
    ]  # fmt: skip


TWO_HOSTS = ["cluster.num_nodes=2", "cluster.cpus_per_worker=2"]


def files_of(run_dir: Path) -> dict:
    """SHA-256 of the weights and masks that the stages have made."""
    found = {}
    for stage in ("prune", "distill"):
        record = json.loads((run_dir / stage / "record.json").read_text())
        found |= {f"{stage}/{path}": file["sha256"] for path, file in record["outputs"].items()}
    weights = {path: digest for path, digest in found.items() if path.endswith(".safetensors")}
    assert len(weights) >= 4
    return weights


def steps_of(run_dir: Path) -> list[int]:
    return [
        step["step"]
        for step in json.loads((run_dir / "summary.json").read_text())["recovery"]["steps"]
    ]


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
