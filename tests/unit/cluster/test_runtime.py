"""What importing the runtime does to a process: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import runtime
from cluster.runtime.backend import RayCluster
from cluster.spec import ClusterSpec

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


def test_nodes_are_excluded_where_the_others_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes of two GPUs for four workers: one can be spared, and then none."""
    nodes = [
        {"NodeManagerHostname": f"n{number}", "NodeID": f"id{number}", "Alive": True,
         "Resources": {"CPU": 16.0, "GPU": 2.0}}
        for number in range(3)
    ]  # fmt: skip
    nodes.append({**nodes[0], "NodeManagerHostname": "gone", "NodeID": "id3", "Alive": False})
    monkeypatch.setattr("cluster.runtime.backend.ray.nodes", lambda: nodes)
    spec = ClusterSpec(num_nodes=2, num_workers=4, gpus_per_worker=1, cpus_per_worker=8)
    cluster = RayCluster(spec, "run", Path("/project"), lambda event: None)
    assert cluster._elsewhere() is None
    assert not cluster.exclude(["n0", "n1"])
    assert cluster._elsewhere() is None
    assert cluster.exclude(["n1"])
    assert cluster._elsewhere() == {"ray.io/node-id": "!in(id1)"}
    assert cluster._scaling()["label_selector"] == {"ray.io/node-id": "!in(id1)"}
    assert not cluster.exclude(["n0"])
    assert not cluster.exclude(["another name of n0"])
