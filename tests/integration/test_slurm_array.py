"""A sweep on a real Slurm of two hosts: one array; one run of it cancelled, resumed, compared."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.slurm_rig import Rig
from tests.integration.slurm_runs import SECRET, jobs, rig_of_tests


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_of_tests(tmp_path_factory.getbasetemp()) as started:
        yield started


def states(rig: Rig, sweep: Path) -> dict[str, str]:
    """State of each run by its seed, as jobs.manage says."""
    said = jobs(rig, "manage", "status", str(sweep))
    assert said.returncode == 0, said.stderr
    return dict(re.findall(r"seed-(\d) +slurm +\S+ +(\w+)", said.stdout))


def record(run_dir: Path) -> dict:
    return json.loads((run_dir / ".cluster" / "job.json").read_text())


@pytest.mark.slow  # ten minutes of one job after another
def test_sweep_is_one_array(
    rig: Rig, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Two at once on one host, each with its own Ray and token; the third is cancelled while it
    waits, put back into the queue alone, cancelled while it runs, and resumed with the sweep."""
    sweep = tmp_path / "a 'sweep' $(d)"
    done = jobs(
        rig, "prune", "--multirun", "run.seed=0,1,2", f"run.dir={sweep}",
        f"model.path={tiny_model_dir}", f"data.calibration={text_file}", "data.sequence_length=64",
        "stages=[prune,distill]", "prune.num_samples=8", "prune.baselines=[]",
        "prune.rotation_steps=2", "distill.num_tokens=8192", "distill.batch_size=8",
        "distill.micro_batch_size=4", "tracker.wandb=off", "cluster.kind=slurm",
        "cluster.num_workers=2", "cluster.start_timeout_s=240", "cluster.slurm.time=30",
        "cluster.slurm.exclusive=false", "cluster.sweep_jobs=2",
        'cluster.slurm.extra=["--nodelist=tfn0"]', "hydra.sweep.subdir='seed-${run.seed}'",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = [sweep / f"seed-{seed}" for seed in range(3)]
    ids = [record(run)["id"] for run in runs]
    number = ids[0].split("_")[0]
    assert ids == [f"{number}_{task}" for task in range(3)]
    assert done.stdout.count("slurm job") == 3
    folders = [sweep / ".cluster", *(run / ".cluster" for run in runs)]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    written = [path for folder in folders for path in folder.glob("*.*") if path.suffix != ".log"]
    assert len(written) >= 7
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o600}

    def log(task: int) -> str:
        found = sorted(runs[task].glob(f".cluster/*_{task}.log"))
        return "".join(path.read_text() for path in found)

    assert states(rig, sweep)["2"] == "waiting"
    rig.wait_for("two at once", lambda: all("prune: starting" in log(task) for task in (0, 1)), 400)
    assert states(rig, sweep) == {"0": "running", "1": "running", "2": "waiting"}
    tokens = {(run / ".cluster" / "token").read_text() for run in runs[:2]}
    assert len(tokens) == 2
    ports = [re.search(r"Ray at (\S+)", log(task))[1] for task in (0, 1)]
    assert ports[0] != ports[1]
    cancelled = jobs(rig, "manage", "cancel", str(runs[2]))
    assert cancelled.stdout == f"job {number}_2 is cancelled\n"
    rig.wait_for("the others' end", lambda: "running" not in states(rig, sweep).values(), 600)
    assert states(rig, sweep) == {"0": "done", "1": "done", "2": "stopped"}, log(0) + log(1)

    # Only what is not done; the same script, another array, the run's number in it as before.
    resumed = jobs(rig, "manage", "resume", str(sweep))
    assert resumed.stdout.startswith(f"submitted: 1 run of the sweep {sweep}\n"), resumed
    again = record(runs[2])["id"]
    assert re.fullmatch(r"\d+_2", again)
    assert again != ids[2]
    assert [record(run)["id"] for run in runs[:2]] == ids[:2]
    rig.wait_for("its start", lambda: "prune: starting" in log(2), 400)
    # As at the end of its time: it saves and goes back into the queue, it alone.
    rig.slurm("scancel", "--batch", "--signal=USR1", again)
    rig.wait_for("the queue", lambda: f"job {again} goes back into the queue" in log(2), 300)
    rig.wait_for("its second wait", lambda: states(rig, sweep)["2"] == "waiting", 120)
    assert states(rig, sweep) == {"0": "done", "1": "done", "2": "waiting"}
    rig.slurm("scontrol", "update", f"JobId={again}", "StartTime=now+15")
    rig.wait_for("its second start", lambda: f"job {again}, attempt 2" in log(2), 400)
    rig.wait_for("its end", lambda: states(rig, sweep)["2"] == "done", 600)
    assert jobs(rig, "manage", "resume", str(sweep)).stdout.endswith("are done, or still there\n")

    compared = jobs(rig, "manage", "compare", str(sweep))
    assert compared.returncode == 0, compared.stderr
    found = json.loads((sweep / "compare.json").read_text())
    assert found["differs"] == ["run.seed"]
    assert [(run["words"]["run.seed"], run["state"]) for run in found["runs"]] == [
        ("0", "done"), ("1", "done"), ("2", "done"),
    ]  # fmt: skip
    assert all(run["median_error"] > 0 and run["num_tokens"] == 8192 for run in found["runs"])
    for path in sweep.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    # Once Slurm has forgotten a job, what its script left behind says how it ended.
    assert (runs[0] / ".cluster" / f"{ids[0]}.exit").read_text() == "0\n"
