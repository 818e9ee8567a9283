"""The preflight on a real Slurm: a bad node is named and replaced, or ends the job."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.slurm_rig import Rig
from tests.integration.test_slurm import (  # noqa: F401  rig and words are fixtures
    TWO_HOSTS,
    Submitted,
    jobs,
    rig,
    words,
)

pytestmark = pytest.mark.slow

PRUNE = ["stages=[prune]", "cluster.preflight.when=always"]


def on(slurm: Rig, host: str, *command: str) -> str:
    """What a command prints on one of the hosts, which is not in use."""
    return slurm.slurm("srun", "--chdir=/", f"--nodelist={host}", "--time=1", *command)


@contextlib.contextmanager
def little_shared_memory(slurm: Rig, host: str) -> Iterator[None]:
    """The host's /dev/shm as small as no container's."""
    on(slurm, host, "mount", "-o", "remount,size=8m", "/dev/shm")
    try:
        yield
    finally:
        on(slurm, host, "mount", "-o", "remount,size=50%", "/dev/shm")


TOO_LITTLE = (
    "preflight: tfn0: /dev/shm holds 0.00839 GB, cluster.preflight.min_shm_gb=0.1 expected; make "
    "it larger (docker --shm-size)"
)


def findings(run: Submitted) -> list[dict]:
    return json.loads((run.run_dir / ".cluster" / "preflight.json").read_text())["findings"]


def test_command_as_a_job_of_two_hosts(rig: Rig, tmp_path: Path) -> None:  # noqa: F811
    """A line for each host, which have spoken with each other; the clock is this machine's."""
    options = [*TWO_HOSTS, "cluster.kind=slurm", "cluster.slurm.time=20", "cluster.num_workers=2"]
    options += ["cluster.start_timeout_s=240", "cluster.preflight.min_all_reduce_gb_s=0"]
    done = jobs(rig, "preflight", *options, f"preflight.out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / ".cluster"
    number = json.loads((folder / "job.json").read_text())["id"]
    ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")

    def state() -> str:
        shown = rig.slurm("scontrol", "show", "job", "--oneliner", number)
        return re.search(r"JobState=(\S+)", shown)[1]

    rig.wait_for("its end", lambda: state() in ended, 600)
    log = (folder / f"{number}.log").read_text()
    assert state() == "COMPLETED", log
    record = json.loads((folder / "preflight.json").read_text())
    assert record["nodes"] == record["hosts"] == ["tfn0", "tfn1"]
    assert all(fact["sees_driver"] and not fact["unseen"] for fact in record["facts"]["storage"])
    assert all(fact["gb_s"] > 0 for fact in record["facts"]["network"])
    for fact in record["facts"]["clocks"]:
        assert abs(fact["offset_s"]) <= fact["uncertainty_s"] + 0.01
    rows = log.split("NODE ")[1].splitlines()[1:3]
    assert [row.split()[:2] for row in rows] == [["tfn0", "1"], ["tfn1", "1"]]


def test_job_goes_on_without_a_bad_node(
    rig: Rig, words: list[str], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    rig.slurm("scontrol", "update", "NodeName=tfn1", "Weight=10")  # tfn0 is the one to be given
    with little_shared_memory(rig, "tfn0"):
        run = Submitted(rig, tmp_path / "run", [*words, *PRUNE])
        number = run.record["id"]
        run.wait_for("the queue again", lambda: run.state() == "PENDING" and "goes back" in run.log)
        assert f"error: {TOO_LITTLE}" in run.log
        assert [found["node"] for found in findings(run)] == ["tfn0"]
        assert f"job {number} goes back into the queue, for other nodes in place of tfn0" in run.log
        shown = rig.slurm("scontrol", "show", "job", "--oneliner", number)
        assert "ExcNodeList=tfn0 " in shown
        rig.slurm("scontrol", "update", f"JobId={number}", "StartTime=now+15")
        run.wait_for_end()
        assert run.state() == "COMPLETED", run.log
    assert re.search(rf"job {number}, attempt 2 on tfn1: Ray", run.log)
    assert findings(run) == []
    assert (run.run_dir / "prune" / "record.json").is_file()
    assert not (run.run_dir / ".cluster" / "bad-nodes").exists()


@pytest.mark.parametrize("how", ["little shared memory", "another folder"])
def test_job_ends_with_the_line_where_no_node_is_left(
    rig: Rig, words: list[str], tmp_path: Path, how: str  # noqa: F811
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with contextlib.ExitStack() as stack:
        if how == "another folder":
            bad, said = "tfn1", f"tfn1: does not have {run_dir}/.cluster/job.sh; mount the shared"
            on(rig, bad, "mount", "-t", "tmpfs", "tmpfs", str(run_dir))
            stack.callback(on, rig, bad, "umount", str(run_dir))
        else:
            bad, said = "tfn0", TOO_LITTLE
            stack.enter_context(little_shared_memory(rig, bad))
        run = Submitted(rig, run_dir, [*words, *TWO_HOSTS, *PRUNE])
        rig.wait_for(
            "its end", lambda: run.state() not in ("PENDING", "RUNNING", "COMPLETING"), 400
        )
        assert run.state() == "FAILED", run.log
    assert said in run.log
    assert run.log.count("error: ") == 1, run.log
    assert f"no other nodes of this Slurm would do in place of {bad}" in run.log
    assert "goes back into the queue" not in run.log
    assert "failed (exit code 2)" in run.manage("status")
    assert (run_dir / ".cluster" / "bad-nodes").read_text() == f"{bad}\n"
    assert rig.slurm("squeue", "--noheader") == ""
