"""The contract of all kinds, by the two that need no scheduler: this process, this machine."""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import launch
from cluster.errors import ClusterError
from cluster.kinds import get_kind
from cluster.kinds._base import Job, Kind, Status, call
from cluster.kinds.local import process_id
from cluster.spec import KINDS, ClusterSpec

MODULE = """
import os, sys, time
print("words", *sys.argv[1:], flush=True)
print("token" if os.environ.get("TOKEN") else "no token", flush=True)
if sys.argv[1] == "wait":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one module, which ends with the code that it is given or waits."""
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "twofour_test_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    return folder


def job_of(root: Path, kind: str, *words: str) -> Job:
    run_dir = root.parent / "run"
    return Job(
        kind=kind, name="run", command=("-m", "twofour_test_module", *words), typed="typed",
        root=str(root), directory=str(root), run_dir=str(run_dir),
    )  # fmt: skip


def ended(job: Job) -> Status:
    deadline = time.monotonic() + 30
    while (status := get_kind(job.kind).status(job)).is_alive:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return status


def test_every_kind_is_found() -> None:
    assert {"local", "inprocess", "slurm"} <= set(KINDS)
    for name in KINDS:
        assert isinstance(get_kind(name), Kind)
        assert get_kind(name).name == name
    with pytest.raises(ValueError, match="no such kind of cluster; there are "):
        get_kind("cloud")


@pytest.mark.parametrize("kind", ["local", "inprocess"])
@pytest.mark.parametrize(("word", "state"), [("0", "done"), ("75", "stopped"), ("2", "failed")])
def test_submitted_and_ended(root: Path, kind: str, word: str, state: str) -> None:
    spec = ClusterSpec(kind=kind)
    job = launch.submit(spec, job_of(root, kind, word, "a b", "$(c)"), {"config.yaml": "x"})
    status = ended(job)
    assert (status.state, status.exit_code) == (state, int(word))
    assert next(get_kind(kind).logs(job)) == f"words {word} a b $(c)"
    assert launch.find_job(Path(job.run_dir)) == job
    assert launch.find_jobs(root.parent) == [job]
    assert stat.S_IMODE((job.folder / "config.yaml").stat().st_mode) == 0o600


def test_resumed_in_the_same_log(root: Path) -> None:
    job = launch.submit(ClusterSpec(), job_of(root, "local", "75"), {})
    ended(job)
    again = launch.resume(Path(job.run_dir))
    assert again.id != job.id
    ended(again)
    assert len([line for line in get_kind("local").logs(again) if line == "words 75"]) == 2


@pytest.mark.parametrize("now", [False, True])
def test_local_job_is_followed_refused_twice_and_cancelled(root: Path, now: bool) -> None:
    kind = get_kind("local")
    job = launch.submit(ClusterSpec(), job_of(root, "local", "wait"), {})
    lines = kind.logs(job, follow=True)
    while next(lines) != "ready":
        pass
    with pytest.raises(ClusterError, match=r"has a job already, local .*running"):
        launch.submit(ClusterSpec(), job_of(root, "local", "0"), {})
    assert ("asked to save" in kind.cancel(job, now)) is not now
    assert list(lines) == []
    status = ended(job)
    assert (status.state, status.exit_code) == (("failed", None) if now else ("stopped", 75))
    assert "nothing is running" in kind.cancel(job)


def test_a_process_of_the_same_number_is_another(root: Path) -> None:
    job = dataclasses.replace(job_of(root, "local"), id=process_id(os.getpid(), at_terminal=True))
    assert get_kind("local").status(job).state == "running"
    with pytest.raises(ClusterError, match="was started at a terminal"):
        list(get_kind("local").logs(job))
    host, pid, started, place = job.id.split(":")
    later = dataclasses.replace(job, id=f"{host}:{pid}:{int(started) + 1}:{place}")
    assert get_kind("local").status(later).state == "stopped"
    elsewhere = dataclasses.replace(job, id=f"other:{pid}:{started}")
    with pytest.raises(ClusterError, match="runs on other; ask there"):
        get_kind("local").status(elsewhere)


class Interrupted(Kind):
    """A kind whose log is interrupted by Ctrl-C after one line."""

    name = "interrupted"

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def files(self, spec: ClusterSpec, job: Job) -> dict[str, str]:
        return {}

    def submit(self, job: Job) -> str:
        return "5"

    def status(self, job: Job) -> Status:
        return Status("running")

    def logs(self, job: Job, follow: bool = False) -> Iterator[str]:
        yield "one"
        raise KeyboardInterrupt

    def cancel(self, job: Job, now: bool = False) -> str:
        self.cancelled.append(job.id)
        return "cancelled"

    def hints(self, job: Job) -> list[str]:
        return []


@pytest.mark.parametrize("answer", [True, False])
def test_ctrl_c_asks_before_it_cancels(root: Path, answer: bool) -> None:
    kind, said, asked = Interrupted(), [], []
    job = dataclasses.replace(job_of(root, "local"), id="5")
    kind.attach(job, said.append, lambda question: asked.append(question) or answer)
    assert said[0] == "one"
    assert asked == ["cancel job 5?"]
    assert kind.cancelled == (["5"] if answer else [])
    assert answer or "job 5 goes on" in said[1]


def test_a_folder_of_somebody_else_is_refused(root: Path) -> None:
    job = job_of(root, "local", "0")
    (root / "elsewhere").mkdir()
    job.folder.parent.mkdir()
    job.folder.symlink_to(root / "elsewhere")
    with pytest.raises(ClusterError, match="is not a folder of yours"):
        launch.submit(ClusterSpec(), job, {"config.yaml": "x"})
    assert list((root / "elsewhere").iterdir()) == []


def test_a_record_that_others_may_have_written_is_not_followed(root: Path) -> None:
    job = launch.submit(ClusterSpec(), job_of(root, "local", "0"), {})
    ended(job)
    job.folder.chmod(0o777)
    with pytest.raises(ClusterError, match="others may have written it"):
        launch.resume(Path(job.run_dir))


def test_a_damaged_record_is_one_line(root: Path) -> None:
    job = job_of(root, "local", "0")
    job.folder.mkdir(parents=True, mode=0o700)
    (job.folder / "job.json").write_text("{")
    with pytest.raises(ClusterError, match=r"job\.json: cannot be read") as error:
        launch.find_job(Path(job.run_dir))
    assert "\n" not in str(error.value)


def test_schedulers_that_are_silent_or_not_there() -> None:
    with pytest.raises(ClusterError, match="there is no twofour-none on this machine"):
        call(["twofour-none"], "asking")
    with pytest.raises(ClusterError, match=r"asking: .* did not answer for 0\.2 s"):
        call([sys.executable, "-c", "import time; time.sleep(9)"], "asking", timeout_s=0.2)
    with pytest.raises(ClusterError, match=r"asking: sh: two words$"):
        call(["sh", "-c", "printf 'two\n words\n' >&2; exit 3"], "asking")
