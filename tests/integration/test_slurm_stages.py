"""Stages with resources of their own on a real Slurm of two hosts, as dependent jobs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.integration.slurm_rig import Rig
from tests.integration.test_slurm import (
    TWO_HOSTS,
    Submitted,
    files_of,
    jobs,
    rig,  # noqa: F401  a fixture
    steps_of,
    words,  # noqa: F401  a fixture
)

pytestmark = pytest.mark.slow

CHAIN = [*TWO_HOSTS, "cluster.stages.distill.num_nodes=1", "cluster.stages.distill.slurm.time=20"]
"""prune has both hosts, distill has one"""


class Chain(Submitted):
    """A run that `jobs.prune` has submitted as two jobs."""

    @property
    def ids(self) -> list[str]:
        first, second = self.record["id"].split(",")
        return [first, second]

    @property
    def log(self) -> str:
        paths = [self.run_dir / ".cluster" / f"{job}.log" for job in self.ids]
        return "".join(path.read_text() for path in paths if path.exists())

    def job(self, number: int) -> dict[str, str]:
        text = self.rig.slurm("scontrol", "show", "job", "--oneliner", self.ids[number])
        return dict(word.split("=", 1) for word in reversed(text.split()) if "=" in word)

    def states(self) -> list[str]:
        return [self.job(number)["JobState"] for number in (0, 1)]

    def state(self) -> str:
        """FAILED and its like only where no job is left that could still do something."""
        states = self.states()
        return next(
            (one for one in states if one in ("RUNNING", "PENDING", "COMPLETING")), states[0]
        )

    def wait_for_end(self) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.rig.wait_for("both jobs' end", lambda: all(s in ended for s in self.states()), 1500)


def test_a_stage_on_one_host_after_one_on_two(rig: Rig, words: list[str], tmp_path: Path) -> None:  # noqa: F811
    chain = Chain(rig, tmp_path / "a chain", [*words, *CHAIN])
    first, second = chain.ids
    assert f"job {second}: distill, after job {first}" in chain.shown
    assert (chain.job(0)["NumNodes"].split("-")[0], chain.job(1)["NumNodes"].split("-")[0]) == (
        "2", "1",
    )  # fmt: skip
    assert chain.job(1)["Dependency"] == f"afterok:{first}(unfulfilled)"
    listed = jobs(rig, "manage", "list", str(tmp_path)).stdout
    assert f"distill: waiting (pending: waits for afterok:{first}" in listed
    # The same in one process group of this machine, while the jobs wait and run.
    alone = tmp_path / "alone"
    done = jobs(rig, "prune", *words, "cluster.executor=plain", f"run.dir={alone}")
    assert done.returncode == 0, done.stderr

    chain.wait_for_end()
    assert chain.states() == ["COMPLETED", "COMPLETED"], chain.log
    parts = chain.manage("logs").split(f"--- job {second}: distill\n")
    assert parts[0].startswith(f"--- job {first}: prune\n")
    assert "prune: starting" in parts[0]
    assert "distill: starting" not in parts[0]
    assert "distill: starting" in parts[1]
    assert "prune: starting" not in parts[1]
    said = chain.manage("status")
    assert f"slurm job {first},{second}: done" in said
    assert "finished stages: prune, distill" in said
    assert files_of(chain.run_dir) == files_of(alone)
    assert steps_of(chain.run_dir) == steps_of(alone)


def test_requeue_keeps_the_rest_waiting_and_cancel_ends_all(
    rig: Rig, words: list[str], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    chain = Chain(rig, tmp_path / "run", [*words, *CHAIN])
    first, second = chain.ids
    chain.wait_for("the first job", lambda: chain.states()[0] == "RUNNING", 300)
    rig.slurm("scontrol", "requeue", first)
    chain.wait_for("the queue again", lambda: chain.states()[0] == "PENDING", 120)
    for _ in range(3):
        time.sleep(3)
        assert chain.states() == ["PENDING", "PENDING"]
        assert chain.job(1)["Dependency"].startswith(f"afterok:{first}")
    assert f"slurm job {first},{second}: waiting" in chain.manage("status")
    said = chain.manage("cancel")
    assert said == f"job {second} is cancelled; job {first} is cancelled\n"
    chain.wait_for_end()
    assert "stopped" in chain.manage("status")

    assert "submitted: slurm job" in chain.manage("resume")
    assert not {first, second} & set(chain.ids)
    chain.wait_for("its work", lambda: "prune: starting" in chain.log)
    said = chain.manage("cancel")
    assert said.startswith(f"job {chain.ids[1]} is cancelled; job {chain.ids[0]} was asked to save")
    chain.wait_for_end()
    assert chain.states() == ["FAILED", "CANCELLED"], chain.log
    assert f"slurm job {','.join(chain.ids)}: stopped" in chain.manage("status")


def test_first_failure_ends_the_rest(rig: Rig, words: list[str], tmp_path: Path) -> None:  # noqa: F811
    missing = tmp_path / "no-such-setup.sh"
    chain = Chain(rig, tmp_path / "run", [*words, *CHAIN, f"cluster.slurm.setup={missing}"])
    chain.wait_for_end()
    assert chain.states() == ["FAILED", "CANCELLED"]
    said = chain.manage("status")
    assert (
        f"slurm job {','.join(chain.ids)}: failed (prune: failed (exit code 1); distill: " in said
    )
    assert "carry on with: python -m jobs.manage resume" in said
    done = jobs(rig, "manage", "logs", str(chain.run_dir), "--follow")
    assert done.returncode == 1
    assert str(missing) in done.stdout
    assert not (chain.run_dir / "distill").exists()
