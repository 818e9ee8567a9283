"""The preflight as a command of its own and at the start of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.conftest import Run

# No machine fails these, however busy.
ANYTHING = [f"cluster.preflight.min_{name}=0" for name in (
    "write_mb_s", "read_mb_s", "free_gb", "shm_gb", "all_reduce_gb_s",
)]  # fmt: skip


@pytest.mark.parametrize("executor", ["plain", "ray"])
def test_command(run_job: Run, tmp_path: Path, executor: str) -> None:
    words = ["cluster.num_workers=2", f"cluster.executor={executor}", f"preflight.out={tmp_path}/f"]
    done = run_job("preflight", *words, *ANYTHING)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "f" / ".cluster" / "preflight.json"
    assert done.stdout.strip() == str(path)
    record = json.loads(path.read_text())
    assert [fact["is_right"] for fact in record["facts"]["arithmetic"]] == [True, True]
    assert all(fact["gb_s"] > 0 for fact in record["facts"]["network"])
    (node,) = record["nodes"]
    head, row = done.stderr.split("NODE ")[1].splitlines()[:2]
    assert row.split()[:2] == [node, "2"]
    assert "ALL-REDUCE" in head
    assert "1 node(s) are fit" in done.stderr
    assert sorted(entry.name for entry in (tmp_path / "f").iterdir()) == [".cluster", ".lock"]


def test_bad_node_stops_a_run_before_its_first_stage(
    run_job: Run, small: list[str], tmp_path: Path
) -> None:
    limits = ["cluster.preflight.when=always", "cluster.preflight.min_shm_gb=1e6"]
    done = run_job("prune", *small, *ANYTHING, *limits, f"run.dir={tmp_path}/run")
    assert done.returncode == 2, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert "cluster.preflight.min_shm_gb=1e+06 expected; make it larger" in line
    (node,) = json.loads((tmp_path / "run" / ".cluster" / "preflight.json").read_text())["nodes"]
    assert line.startswith(f"error: preflight: {node}: /dev/shm holds ")
    assert not (tmp_path / "run" / "prune").exists()
    done = run_job("prune", *small, "stages=[prune]", f"run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "preflight" not in done.stderr
