"""The processes of a local Ray, stood in for by others: recorded, watched, ended, and cleared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.runtime.processes import LocalRay, began, kill
from tests.conftest import REPOSITORY

TIMEOUT_S = 60

# A run whose process ends when it hears of its raylet's death, as Ray's C++ ends it.
ENDED = """
import os, subprocess, sys
from pathlib import Path
from cluster.runtime.processes import LocalRay
folder, kind = Path(sys.argv[1]), sys.argv[2]
local = LocalRay(folder / "records")
local.begin()
raylet = subprocess.Popen([folder / "raylet", "1000"], stdout=-3, stderr=-3)
local.look()
print(raylet.pid, flush=True)
if kind == "speaks":
    local.is_ending()
if kind == "killed":
    os.kill(os.getpid(), 9)
raylet.kill()
raylet.wait()
if kind in ("ended while it ends its Ray", "lost, and says so"):
    assert local.check()
    local.is_ending()
if kind == "lost, and says so":
    local.has_spoken()
os._exit(1)
"""

# A run that starts a Ray: a process with the session's folder on its command line, and its child.
RUN = """
import os, subprocess, sys, time
from pathlib import Path
from cluster.runtime.processes import LocalRay
root, temporary = map(Path, sys.argv[1:])
local = LocalRay(root)
local.begin()
session = temporary / f"session_now_{os.getpid()}"
session.mkdir()
(temporary / "session_latest").symlink_to(session)
code = "import subprocess, time; subprocess.Popen(['sleep', '1000'], start_new_session=True); "
code += "time.sleep(1000)"
child = subprocess.Popen([sys.executable, "-c", code, f"--logs={session}/logs"])
while len(local._known) < 2 or not any(local._folder.glob("*.json")):
    time.sleep(0.05)
print(*local._known, flush=True)
time.sleep(1000)
"""


def until(ready: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not ready():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "ray").mkdir()
    return tmp_path / "records", tmp_path / "ray"


@pytest.fixture
def run(folders: tuple[Path, Path]) -> Iterator[tuple[subprocess.Popen, dict[int, int | None]]]:
    """A run that lives, and its Ray's processes."""
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, folders)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    processes = {int(word): began(int(word)) for word in child.stdout.readline().split()}
    yield child, processes
    child.kill()
    child.wait()
    for pid, begun in processes.items():
        if begun is not None:
            kill(pid, begun)


def alive(processes: dict[int, int | None]) -> list[int]:
    return [pid for pid, begun in processes.items() if began(pid) == begun]


def test_the_next_run_clears_what_a_killed_one_left(folders, run) -> None:
    records, temporary = folders
    child, processes = run
    assert len(alive(processes)) == 2
    child.send_signal(signal.SIGKILL)
    child.wait()
    local = LocalRay(records)
    said = local.begin()
    until(lambda: not alive(processes))
    assert said == (
        "cleared what a run that was killed had left of its Ray: 2 processes, 1 folders of logs"
    )
    assert list(temporary.iterdir()) == []
    local.end(keep_folder=False)
    assert [path.name for path in records.iterdir()] == ["lock"]


def test_a_run_that_lives_is_left_alone(folders, run) -> None:
    records, temporary = folders
    _, processes = run
    local = LocalRay(records)
    assert local.begin() == ""
    local.end(keep_folder=False)
    assert len(alive(processes)) == 2
    assert len(list(temporary.glob("session_now_*"))) == 1


@pytest.mark.parametrize("change", ["began", "place"])
def test_a_number_that_means_another_process_by_now_is_left_alone(folders, run, change) -> None:
    records, _ = folders
    child, processes = run
    child.send_signal(signal.SIGKILL)
    child.wait()
    (path,) = records.glob("*/processes.json")
    content = json.loads(path.read_text())
    if change == "began":
        content["processes"] = [[pid, begun + 1] for pid, begun in content["processes"]]
    else:
        content["place"] = ["another start of the machine", content["place"][1]]
    path.write_text(json.dumps(content))
    local = LocalRay(records)
    assert "0 processes, 1 folders" in local.begin()
    local.end(keep_folder=False)
    assert len(alive(processes)) == 2


def test_records_where_others_may_write_are_not_believed(folders, run) -> None:
    records, _ = folders
    child, processes = run
    child.send_signal(signal.SIGKILL)
    child.wait()
    records.chmod(0o777)
    local = LocalRay(records)
    assert local.begin() == ""
    local.end(keep_folder=False)
    assert len(alive(processes)) == 2


def test_a_folder_that_is_no_session_is_not_removed(folders, run) -> None:
    records, temporary = folders
    child, _ = run
    child.send_signal(signal.SIGKILL)
    child.wait()
    (path,) = records.glob("*/processes.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "session": str(temporary)}))
    local = LocalRay(records)
    local.begin()
    local.end(keep_folder=False)
    assert temporary.is_dir()


def test_a_dead_raylet_is_noticed_and_the_rest_ended(tmp_path: Path) -> None:
    raylet = tmp_path / "raylet"
    shutil.copy(shutil.which("sleep") or "", raylet)
    before = subprocess.Popen(["sleep", "1000"])
    local = LocalRay(tmp_path / "records")
    local.begin()
    vital, other = (subprocess.Popen([path, "1000"]) for path in (raylet, "sleep"))
    try:
        until(lambda: bool(local._vital))
        assert local.check() is None
        vital.kill()
        until(lambda: local.lost is not None)
        assert local.lost.startswith(f"Ray's raylet (process {vital.pid}) on this machine has died")
        assert "run the same command again" in local.lost
        local.end(keep_folder=False)
        assert other.wait(TIMEOUT_S) == -signal.SIGKILL
        assert before.poll() is None, "it was there before Ray"
    finally:
        for child in (before, vital, other):
            child.kill()
            child.wait()


@pytest.mark.parametrize(
    "kind", ["ended", "ended while it ends its Ray", "speaks", "lost, and says so", "killed"]
)
def test_what_the_run_cannot_say_itself_is_said(tmp_path: Path, kind: str) -> None:
    shutil.copy(shutil.which("sleep") or "", tmp_path / "raylet")
    run = subprocess.run(
        [sys.executable, "-c", ENDED, str(tmp_path), kind], cwd=REPOSITORY, text=True,
        capture_output=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    pid = int(run.stdout)
    if kind == "killed":
        os.kill(pid, signal.SIGKILL)
    wanted = f"error: Ray's raylet (process {pid}) on this machine has died, as happens when"
    if kind.startswith("ended"):
        assert run.stderr.startswith(wanted)
        assert run.stderr.count("\n") == 1
    else:
        assert run.stderr.strip() == ""


def test_an_ended_process_began_never() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    begun = began(child.pid)
    assert begun is not None
    assert kill(child.pid, begun)
    until(lambda: began(child.pid) is None)  # a zombie until it is waited for
    child.wait()
    assert not kill(child.pid, begun)
    assert began(os.getpid()) is not None
