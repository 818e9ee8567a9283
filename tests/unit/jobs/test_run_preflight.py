"""When a run has its nodes checked, and what becomes of the verdict."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Self

import pytest

from cluster.preflight import examine
from cluster.spec import ClusterSpec, PreflightSpec
from jobs.runs.preflight import BAD_NODES, RECORD, is_due, preflight
from sparsify.errors import InputError
from tests.conftest import message

SPEC = ClusterSpec(num_nodes=2, num_workers=2)


def facts(shm_bytes: int = 10**10, write_mb_s: float = 500.0, node_b: str = "b") -> dict[str, Any]:
    """Of two workers on the nodes `a`, which is fine, and another."""
    fine = {
        "sees_driver": True, "unseen": [], "write_mb_s": 500.0, "read_mb_s": 500.0,
        "free_bytes": 10**12, "shm_bytes": 10**10,
    }  # fmt: skip
    versions = dict.fromkeys(("python", "torch", "transformers", "ray", "deepspeed", "source"), "1")
    return {
        "hosts": ["a", node_b],
        "facts": {
            "gpus": [{"wanted": 0}] * 2,
            "versions": [versions] * 2,
            "clocks": [{"offset_s": 0.0, "uncertainty_s": 0.001}] * 2,
            "storage": [fine, {**fine, "shm_bytes": shm_bytes, "write_mb_s": write_mb_s}],
            "arithmetic": [{"device": "CPU", "is_right": True, "tflops": 0.03}] * 2,
            "network": [{"gb_s": 1.0}] * 2,
        },
    }  # fmt: skip


class Nodes:
    """An executor whose workers answer as told, one answer a time."""

    dashboard_url = None

    def __init__(self, *answers: dict[str, Any], has_spare: bool = False) -> None:
        self.answers = list(answers)
        self.has_spare = has_spare
        self.excluded: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def exclude(self, nodes: Collection[str]) -> bool:
        self.excluded += nodes
        return self.has_spare

    def run_workers(self, name: str, work: Any, payload: Any, storage: Path) -> Any:
        return self.answers.pop(0)

    def run_tasks(self, *_: Any) -> list[Any]:
        raise AssertionError


@pytest.fixture
def checked(tmp_path: Path) -> Callable[..., tuple[list[str], list[str]]]:
    """What `preflight` returns and what it says."""

    def run(nodes: Nodes, **options: Any) -> tuple[list[str], list[str]]:
        said: list[str] = []
        return preflight(nodes, SPEC, tmp_path, said.append, **options), said

    return run


BAD = (
    "b: /dev/shm holds 0.01 GB, cluster.preflight.min_shm_gb=0.1 expected; make it larger (docker "
    "--shm-size)"
)


@pytest.mark.parametrize(
    ("spec", "due"),
    [
        (ClusterSpec(), False),
        (ClusterSpec(num_workers=8), False),
        (SPEC, True),
        (ClusterSpec(gpus_per_worker=1), True),
        (ClusterSpec(preflight=PreflightSpec(when="always")), True),
        (ClusterSpec(num_nodes=2, preflight=PreflightSpec(when="never")), False),
    ],
)
def test_due_on_several_machines_or_gpus(spec: ClusterSpec, due: bool) -> None:
    assert is_due(spec) is due


def test_fit_nodes_are_shown_and_recorded(checked: Callable, tmp_path: Path) -> None:
    odd, said = checked(Nodes(facts()))
    assert odd == []
    assert said[0] == (
        "preflight: checking every node, 2 workers; cluster.preflight.when=never skips it"
    )
    assert [line.split()[0] for line in said[1:4]] == ["NODE", "a", "b"]
    assert said[4].startswith("preflight: 2 node(s) are fit, in ")
    folder = tmp_path / ".cluster"
    record = json.loads((folder / RECORD).read_text())
    assert (record["nodes"], record["findings"]) == (["a", "b"], [])
    assert record["facts"] == facts()["facts"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in tmp_path.iterdir()] == [".cluster"]


def test_what_is_odd_stops_nothing(checked: Callable) -> None:
    odd, said = checked(Nodes(facts(write_mb_s=3.0)))
    assert odd == [
        "preflight: b: the run's folder is written at 3 MB/s, cluster.preflight.min_write_mb_s=50 "
        "expected; checkpoints will take long; use a faster disk"
    ]
    assert "are fit" in said[-1]


def test_bad_node_is_done_without_where_others_are_spare(checked: Callable, tmp_path: Path) -> None:
    (tmp_path / ".cluster").mkdir()
    (tmp_path / ".cluster" / BAD_NODES).write_text("of an earlier start\n")
    nodes = Nodes(facts(shm_bytes=10**7), facts(node_b="c"), has_spare=True)
    assert checked(nodes)[0] == []
    assert nodes.excluded == ["b"]
    record = json.loads((tmp_path / ".cluster" / RECORD).read_text())
    assert record["nodes"] == ["a", "c"]
    assert not (tmp_path / ".cluster" / BAD_NODES).exists()


@pytest.mark.parametrize("replace", [True, False])
def test_bad_node_ends_the_run_in_one_line(
    checked: Callable, tmp_path: Path, replace: bool
) -> None:
    """Its name is left for a batch script that can ask for others, unless nobody is to."""
    nodes = Nodes(facts(shm_bytes=10**7))
    with pytest.raises(InputError) as error:
        checked(nodes, replace=replace)
    assert message(error) == f"preflight: {BAD}"
    assert nodes.excluded == ["b"] * replace
    path = tmp_path / ".cluster" / BAD_NODES
    assert path.exists() is replace
    assert not replace or path.read_text() == "b\n"
    (finding,) = json.loads((tmp_path / ".cluster" / RECORD).read_text())["findings"]
    assert finding["node"] == "b" and finding["is_bad"] is True


def test_a_fault_of_no_node_excludes_none(checked: Callable, tmp_path: Path) -> None:
    found = facts()
    found["facts"]["network"] = [{"gb_s": 0.001, "pairs": {}}] * 2
    nodes = Nodes(found, has_spare=True)
    with pytest.raises(InputError) as error:
        checked(nodes)
    assert message(error).startswith("preflight: all-reduce over 2 workers runs at 0.001 GB/s")
    assert nodes.excluded == []
    assert not (tmp_path / ".cluster" / BAD_NODES).exists()


def test_every_check_is_judged_from_its_facts() -> None:
    """What `facts` above holds is what the checks there are want: a new one must be in it."""
    assert (
        set(facts()["facts"]) == {check.name for check in examine.checks()} == set(examine.CHECKS)
    )
