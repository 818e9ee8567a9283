"""The rig itself: what one that was killed has left is gone when the next begins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration import slurm_rig
from tests.integration.slurm_runs import REPOSITORY, rig_of_tests

pytestmark = pytest.mark.slow


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that were started for a rig."""
    shown = subprocess.run(
        ["ps", "axwwe", "-o", "args"], capture_output=True, text=True, check=True
    ).stdout
    return [line for line in shown.splitlines() if str(folder) in line]


def test_killed_rig_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    with rig_of_tests(tmp_path):
        pass  # skips where there can be none
    begun = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.slurm_rig"], cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert begun.stdout is not None
        conf = Path(begun.stdout.readline().strip().partition("=")[2])
        folder = conf.parent
        environment = {**os.environ, "SLURM_CONF": str(conf)}
        subprocess.run(
            ["sbatch", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 4242"],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip
        deadline_s = time.monotonic() + 60
        while sum("sleep 4242" in line for line in processes_of(folder)) < 2:
            assert time.monotonic() < deadline_s, processes_of(folder)
            time.sleep(0.5)
    finally:
        begun.send_signal(signal.SIGKILL)
        begun.wait()
    with rig_of_tests(tmp_path) as rig:
        assert rig.is_idle()
        assert processes_of(folder) == []
        assert not folder.exists()
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not any(word in links + names for word in (*slurm_rig.HOSTS, "tfbr0"))
