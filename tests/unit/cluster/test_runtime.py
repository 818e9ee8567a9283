"""What importing the runtime does to a process: nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cluster import runtime

NAME = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def test_importing_what_submits_sets_nothing_that_a_job_of_several_machines_inherits() -> None:
    """Ray refuses a second machine where this is 0, and Slurm hands the environment on."""
    clean = {key: value for key, value in os.environ.items() if key != NAME}
    code = "import os, jobs.cli.submit, jobs.pipeline, cluster.executor; "
    code += f"assert {NAME!r} not in os.environ"
    subprocess.run([sys.executable, "-c", code], env=clean, check=True)


def test_only_a_ray_of_this_machine_keeps_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "as it was")  # put back at the end
    monkeypatch.delenv(NAME)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    runtime.listen_here_alone()
    assert NAME not in os.environ
    monkeypatch.delenv("RAY_ADDRESS")
    runtime.listen_here_alone()
    assert os.environ[NAME] == "0"
