"""Runs submitted to the Slurm of `slurm_rig`, as its tests make and follow them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.integration import slurm_rig
from tests.integration.slurm_rig import Rig

REPOSITORY = Path(__file__).resolve().parents[2]

SECRET = "wandb-key-that-nobody-may-see"


@contextlib.contextmanager
def rig_of_tests(base_temp: Path, slurmd_timeout_s: int = 30) -> Iterator[Rig]:
    """The rig with the tests' folders shared; where there can be none, skips or fails."""
    reason = slurm_rig.why_not()
    if reason is not None:
        if os.environ.get("TWOFOUR_NEED_SLURM") == "1":
            pytest.fail(f"the tests on Slurm cannot run: {reason}")
        pytest.skip(f"no two-host Slurm: {reason}")
    # What hosts have on a shared disk: the tests' folders, and the project where that is in /tmp.
    shared = [base_temp]
    shared += [path for path in (REPOSITORY,) if path.is_relative_to("/tmp")]
    read = [REPOSITORY, *(Path(path) for path in (sys.prefix, sys.base_prefix))]
    with slurm_rig.running(shared, slurmd_timeout_s, read) as started:
        started.environment |= {
            "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WANDB_API_KEY": SECRET,
        }  # fmt: skip
        yield started


def jobs(
    rig: Rig, command: str, *words: str, user: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project's; `user`: words before it that make it somebody else's."""
    return subprocess.run(
        [*user, sys.executable, "-m", f"jobs.{command}", *words],
        env=rig.environment, cwd=REPOSITORY,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


class Submitted:
    """A run that `jobs.prune` has submitted."""

    def __init__(self, rig: Rig, run_dir: Path, words: list[str], user: Sequence[str] = ()) -> None:
        self.rig, self.run_dir = rig, run_dir
        done = jobs(rig, "prune", *words, "cluster.kind=slurm", f"run.dir={run_dir}", user=user)
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

    def wait_until_over(self, seconds: float = 300) -> None:
        """Wait for the job's end, whatever it is."""
        alive = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        self.rig.wait_for(f"the end\n{self.log}", lambda: self.state() not in alive, seconds)

    def wait_for_end(self) -> None:
        self.wait_for("the job's end", lambda: self.state() not in ("PENDING", "RUNNING"), 900)
        self.wait_for("its processes' end", lambda: self.state() != "COMPLETING", 120)


def words_of(model: Path, text: Path) -> list[str]:
    """Options of a small run of two workers that prunes and recovers."""
    return [
        f"model.path={model}", f"data.calibration={text}", "data.sequence_length=64",
        "stages=[prune,distill]", "prune.num_samples=8", "prune.baselines=[]",
        "prune.rotation_steps=2", "distill.num_tokens=8192", "distill.batch_size=8",
        "distill.micro_batch_size=4", "tracker.wandb=off",
        "cluster.num_workers=2", "cluster.start_timeout_s=240", "cluster.slurm.time=30",
    ]  # fmt: skip


TWO_HOSTS = ["cluster.num_nodes=2", "cluster.cpus_per_worker=2"]


def files_of(run_dir: Path, stages: Sequence[str] = ("prune", "distill")) -> dict:
    """SHA-256 of the weights and masks that the stages have made."""
    found = {}
    for stage in stages:
        record = json.loads((run_dir / stage / "record.json").read_text())
        found |= {f"{stage}/{path}": file["sha256"] for path, file in record["outputs"].items()}
    weights = {path: digest for path, digest in found.items() if path.endswith(".safetensors")}
    assert len(weights) >= 2 * len(stages)
    return weights


def steps_of(run_dir: Path) -> list[int]:
    return [
        step["step"]
        for step in json.loads((run_dir / "summary.json").read_text())["recovery"]["steps"]
    ]
