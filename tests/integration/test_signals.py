"""A command that is asked to end while it prunes, and one whose own Ray dies under it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from cluster.runtime.processes import LocalRay
from tests.integration.commands import Command, wait_until
from tests.integration.conftest import REPOSITORY


def test_asked_to_end_while_pruning_it_says_how_it_goes_on_and_does(
    small: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    words = [*small, "cluster.executor=ray", "stages=[prune]", "prune.baselines=[]"]
    words += [f"run.dir={tmp_path / 'run'}"]
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        command = Command("prune", *words, environment=environment, folder=tmp_path)
        wait_until(lambda command=command: "prune: starting" in command.said()[1], command)
        command.send_signal(signal.SIGUSR1)  # ends nothing
        wait_until(lambda command=command: "SIGUSR1: only" in command.said()[1], command)
        command.send_signal(number)
        done = command.finished(120)
        assert done.returncode == code, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"error: interrupted ({number.name}); in prune")
        assert "run the same command again: prune continues" in last
    done = Command("prune", *words, environment=environment, folder=tmp_path).finished(600)
    assert done.returncode == 0, done.stderr


def test_a_raylet_that_dies_ends_the_run_in_one_line_and_leaves_nothing(
    small: list[str], tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    log = tmp_path / "stderr"
    words = [*small, "cluster.executor=ray", "stages=[prune]", f"run.dir={tmp_path / 'run'}"]
    with log.open("w") as errors:
        command = subprocess.Popen(
            [sys.executable, "-m", "jobs.prune", *words], cwd=REPOSITORY, stderr=errors,
            stdout=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
    try:
        while "Ray dashboard:" not in log.read_text():
            assert command.poll() is None, log.read_text()
            time.sleep(0.05)
        processes = psutil.Process(command.pid).children(recursive=True)
        listening = {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in processes
            if process.is_running() and "RayTrainWorker" not in process.name()
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        (raylet,) = (process for process in processes if process.name() == "raylet")
        raylet.kill()
        assert command.wait(60) == 1
    finally:
        command.kill()
    # Where Ray's C++ ends the command, the line comes from a program beside it, a moment later.
    deadline_s = time.monotonic() + 60
    while not (last := log.read_text().splitlines()[-1]).startswith("error: "):
        assert time.monotonic() < deadline_s, last
        time.sleep(0.05)
    assert last.startswith(f"error: Ray's raylet (process {raylet.pid}) on this machine has died")
    assert "run the same command again" in last
    _, left = psutil.wait_procs(processes, timeout=30)
    assert left == []
    # Ended by Ray's C++, the command leaves its record, which the next run on this machine clears.
    following = LocalRay()
    following.begin()
    following.end(keep_folder=False)
    records = Path(tempfile.gettempdir()) / f"twofour-{os.getuid()}"
    assert list(records.glob(f"{command.pid}-*")) == []
