"""The preflight's checks: what is found of a node, and the verdict on all of them."""

from __future__ import annotations

import dataclasses
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.executor import OnEvent
from cluster.plain import PlainCluster
from cluster.preflight import arithmetic, clocks, examine, gpus, network, storage, versions
from cluster.preflight.check import DRIVER, Finding, Place, Report, odd_ones, slow_ones
from cluster.runtime.worker import WorkerContext
from cluster.spec import ClusterSpec, PreflightSpec

GPU_SPEC = ClusterSpec(num_nodes=4, num_workers=8, gpus_per_worker=1)

NODES = [f"n{number}" for number in range(4)]


class Silent:
    """A line to nobody."""

    def post(self, event: dict[str, Any], label: str = "", wait: bool = False) -> None:
        pass

    def fail(self, kind: str, message: str, traceback: str) -> None:
        raise AssertionError(message)

    def is_draining(self) -> bool:
        return False

    def time(self) -> float:
        return 0.0


def place(rank: int, hosts: list[str], spec: ClusterSpec, folder: Path = Path("/none")) -> Place:
    context = WorkerContext(Silent(), "preflight", rank, len(hosts), spec)
    return Place(context, spec, folder, "token", hosts)


def report(spec: ClusterSpec = GPU_SPEC, hosts: list[str] = NODES, **facts: list[Any]) -> Report:
    """Of one worker a node, unless `hosts` has nodes several times."""
    return Report(spec, hosts, facts)


def expecting(**limits: Any) -> ClusterSpec:
    return dataclasses.replace(GPU_SPEC, preflight=PreflightSpec(**limits))


def lines(findings: Any, is_bad: bool = True) -> list[str]:
    return [finding.line() for finding in findings if finding.is_bad == is_bad]


# --- GPUs

SMI = {
    "gpu index,uuid,name,driver_version,memory.total,memory.used":
        "0, GPU-a, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4\n"
        "1, GPU-b, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4\n",
    "gpu uuid,ecc.errors.uncorrected.volatile.total": "GPU-a, 0\nGPU-b, 0\n",
    "gpu uuid,clocks_event_reasons.active": "GPU-a, 0x01\nGPU-b, 0x01\n",
    "gpu uuid,retired_pages.pending": "GPU-a, [N/A]\nGPU-b, [N/A]\n",
    "remapped-rows gpu_uuid,remapped_rows.pending,remapped_rows.failure":
        "GPU-a, 0, 0\nGPU-b, 0, 0\n",
}  # fmt: skip
"""A driver that does not know gpu_recovery_action: query -> answer"""


def install(folder: Path, answers: dict[str, str], dmesg: str | None = None) -> None:
    """Programs that answer as told, and nothing else, on PATH."""
    folder.mkdir(exist_ok=True)
    cases = ""
    for number, (query, text) in enumerate(answers.items()):
        kind, fields = query.split(" ", 1)
        (folder / str(number)).write_text(text)
        words = f"--query-{kind}={fields} --format=csv,noheader,nounits"
        cases += f'"{words}") while read -r line; do echo "$line"; done <"{folder}/{number}" ;;\n'
    program = (
        f'#!/bin/bash\ncase "$*" in\n{cases}'
        '"") echo "| Driver Version: 550.54  CUDA Version: 12.4 |";;\n'
        '*) echo "Field \\"x\\" is not a valid field to query."; exit 2 ;;\nesac\n'
    )
    programs = {"nvidia-smi": program}
    if dmesg is not None:
        programs["dmesg"] = f"#!/bin/bash\necho '{dmesg}'\n"
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> dict[str, Any]:
    """What is found with answers changed: a part of a query's name -> its answer."""
    answers = dict(SMI)
    for part, text in changes.items():
        (query,) = [query for query in answers if part in query]
        answers[query] = text
    install(tmp_path / "bin", answers, "[1.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, fell off")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return gpus.look(place(0, ["n0", "n0"], GPU_SPEC), [])


def verdict(fact: dict[str, Any]) -> list[Finding]:
    return list(gpus.judge(report(hosts=["n0", "n0"], gpus=[fact, None])))


def test_healthy_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fact = looked(tmp_path, monkeypatch)
    assert (fact["cuda"], fact["xids"], fact["unknown"]) == ("12.4", [79], ["recovery"])
    assert [gpu["throttle"] for gpu in fact["gpus"]] == ["0x01"] * 2
    assert lines(verdict(fact)) == []
    assert lines(verdict(fact), is_bad=False) == [
        "n0: the kernel's log has Xid 79 since the last boot, none expected; look at its GPUs if "
        "the run fails there"
    ]
    cells = {title: cell(fact) for title, cell in gpus.CHECK.columns.items()}
    assert cells == {
        "GPUS": "2/2 H100 80GB HBM3", "DRIVER": "550.54.15 (CUDA 12.4)", "HEALTH": "ok",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"index": "0, GPU-a, NVIDIA H100, 550, 81559, 4\n"}, "n0: 1 GPUs found, 2 wanted; use"),
        ({"ecc": "GPU-a, 0\nGPU-b, 3\n"}, "n0: GPU 1: 3 uncorrected ECC errors since its driver"),
        ({"remapped": "GPU-a, 0, 0\nGPU-b, 0, 1\n"}, "n0: GPU 1: has no rows left to remap;"),
        ({"remapped": "GPU-a, No, Yes\nGPU-b, No, No\n"}, "n0: GPU 0: has no rows left to remap;"),
        ({"clocks": "GPU-a, 0x1\nGPU-b, 0x48\n"}, "n0: GPU 1: slowed down by hardware, too hot"),
        ({"ecc": "GPU-a, 0\nGPU-b, [Unknown Error]\n"}, "n0: GPU 1: nvidia-smi says [Unknown"),
    ],
)  # fmt: skip
def test_sick_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], said: str
) -> None:
    fact = looked(tmp_path, monkeypatch, **changes)
    (line,) = lines(verdict(fact))
    assert line.startswith(said)
    if "found" not in said:
        assert gpus.CHECK.columns["HEALTH"](fact) == "1 sick"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"remapped": "GPU-a, 1, 0\nGPU-b, 0, 0\n"}, "n0: GPU 0: remapped rows are pending; reset"),
        ({"retired": "GPU-a, No\nGPU-b, Yes\n"}, "n0: GPU 1: retired pages are pending; reset"),
        ({"clocks": "GPU-a, 0x21\nGPU-b, 0x1\n"}, "n0: GPU 0: is hot and slowed down; look"),
        ({"index": "0, GPU-a, H100, 550, 81559, 40000\n1, GPU-b, H100, 550, 81559, 4\n"},
         "n0: GPU 0: 40,000 of 81,559 MiB are taken before the run begins; end"),
    ],
)  # fmt: skip
def test_odd_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], said: str
) -> None:
    found = verdict(looked(tmp_path, monkeypatch, **changes))
    assert lines(found) == []
    assert any(line.startswith(said) for line in lines(found, is_bad=False))


def test_driver_that_knows_the_old_name_of_throttling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        query.replace("event", "throttle"): "GPU-a, 0x80\nGPU-b, 0x0\n"
        if "event" in query
        else text
        for query, text in SMI.items()
        if "remapped" not in query
    }
    install(tmp_path / "bin", answers)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    fact = gpus.look(place(0, ["n0", "n0"], GPU_SPEC), [])
    assert (fact["unknown"], fact["xids"]) == (["recovery", "remapped rows"], None)
    (line,) = lines(verdict(fact))
    assert line.startswith("n0: GPU 0: power brake, no throttling expected")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (None, "there is no nvidia-smi"),
        ({"index": "0, GPU-a, NVIDIA H100\n"}, "nvidia-smi: 6 fields expected: '0, GPU-a"),
        ({"index": "NVIDIA-SMI has failed because\n"}, "nvidia-smi: 6 fields expected: 'NVIDIA"),
    ],
)  # fmt: skip
def test_gpus_that_cannot_be_counted_are_odd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str] | None, said: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fact = gpus.look(place(0, ["n0", "n0"], GPU_SPEC), [])
    if changes is not None:
        fact = looked(tmp_path, monkeypatch, **changes)
    assert lines(verdict(fact)) == []
    (line,) = lines(verdict(fact), is_bad=False)
    assert line.startswith(f"n0: GPUs cannot be counted: {said}")
    assert [cell(fact) for cell in gpus.CHECK.columns.values()] == ["?/2", "-", "-"]


def test_no_gpus_are_wanted_of_cpus() -> None:
    assert gpus.look(place(0, ["n0"], ClusterSpec()), []) == {"wanted": 0}


def test_unlike_cards_and_drivers_are_named() -> None:
    def fact(name: str, driver: str) -> dict[str, Any]:
        return {"wanted": 1, "gpus": [{"index": "0", "name": name, "driver_version": driver}]}

    facts = [fact("H100", "550"), fact("H100", "535"), fact("H100", "550"), fact("A100", "550")]
    found = list(gpus.judge(report(gpus=facts)))
    assert [line.split(";")[0] for line in lines(found, is_bad=False)] == [
        "n3: GPUs A100, the others have H100", "n1: driver 535, the others have 550",
    ]  # fmt: skip


# --- arithmetic


def test_product_on_this_machine_is_right() -> None:
    fact = arithmetic.multiply(place(0, ["n0"], ClusterSpec()), [])
    assert fact["is_right"] is True
    assert fact["tflops"] > 0


def test_wrong_product_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.Tensor.__matmul__

    def wrong(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(left, other)
        if product.dtype == torch.float32:
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    fact = arithmetic.multiply(place(0, ["n0"], ClusterSpec()), [])
    assert fact["is_right"] is False
    assert arithmetic.CHECK.columns["MATMUL"](fact) == "WRONG"


def test_gpu_that_is_wrong_or_slow_is_named_and_a_slow_cpu_is_not() -> None:
    hosts = ["n0", "n0", "n1", "n1"]

    def fact(tflops: float, is_right: bool = True) -> dict[str, Any]:
        return {"device": "H100", "is_right": is_right, "tflops": tflops}

    facts = [fact(400.0), fact(390.0), fact(100.0), fact(395.0, is_right=False)]
    found = lines(arithmetic.judge(report(hosts=hosts, arithmetic=facts)))
    assert found == [
        "n1: worker 3: its H100 multiplies wrongly; use another node",
        "n1: worker 2: its GPU multiplies at 100 TFLOP/s, the median is 392 and "
        "cluster.preflight.min_gpu_share=0.7 of it expected; use another node",
    ]
    on_cpu = report(ClusterSpec(), hosts, arithmetic=facts[:3])
    assert lines(arithmetic.judge(on_cpu)) == []
    assert slow_ones({"a": 0.7, "b": 1.0, "c": 1.0}, 0.7) == (1.0, [])


# --- versions


def test_versions_of_this_machine() -> None:
    fact = versions.look(place(0, ["n0"], ClusterSpec()), [])
    assert fact["torch"] == torch.__version__
    assert "missing" not in fact.values()


def test_fingerprint_is_of_the_names_and_texts_of_the_source(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    found = []
    for name, text in (("a.py", "x"), ("a.py", "y"), ("b.py", ""), ("notes.txt", "z")):
        (folder / name).write_text(text)
        found.append(versions.fingerprint(tmp_path))
    assert found[0] != found[1] != found[2] == found[3]


def test_node_with_other_versions_is_named() -> None:
    usual = dict.fromkeys(("python", *versions.PACKAGES, "source"), "1")
    facts = [usual, usual, {**usual, "torch": "2", "source": "2"}, usual]
    assert lines(versions.judge(report(versions=facts))) == [
        "n2: torch 2, the others have 1; install the same on every node (make setup)",
        "n2: source 2, the others have 1; have the same files of this project on every node",
    ]
    assert odd_ones({"a": 1, "b": 2}) == (1, ["b"])  # the first node is the driver's more often
    assert odd_ones({"a": 1, "b": 2, "c": 2}) == (2, ["a"])
    assert odd_ones({}) == (None, [])


# --- clocks


@given(
    skew_s=st.floats(-100, 100),
    delays_s=st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=10),
)
def test_true_skew_lies_within_the_uncertainty(
    skew_s: float, delays_s: list[tuple[float, float]]
) -> None:
    """Whatever the two ways of a call take; the uncertainty is half of the quickest call."""
    now_s, left = 1000.0, list(delays_s)

    def theirs() -> float:
        nonlocal now_s
        there_s, back_s = left.pop(0)
        answer = now_s + there_s - skew_s
        now_s += there_s + back_s
        return answer

    offset_s, uncertainty_s = clocks.compare(lambda: now_s, theirs, len(delays_s))
    assert uncertainty_s == pytest.approx(min(sum(pair) for pair in delays_s) / 2, abs=1e-9)
    assert abs(offset_s - skew_s) <= uncertainty_s + 1e-9


def test_clock_that_is_set_back_during_every_call() -> None:
    ticks = iter([5.0, 4.0])
    with pytest.raises(RuntimeError, match="the clock goes backwards"):
        clocks.compare(lambda: next(ticks), lambda: 0.0, 1)


@pytest.mark.parametrize(
    ("offset_s", "uncertainty_s", "is_bad"),
    [(7.0, 0.1, True), (-7.0, 0.1, True), (7.0, 3.0, False), (0.6, 0.05, False), (0.6, 0.2, None),
     (5.0, 0.0, False), (0.003, 0.001, None)],
)  # fmt: skip
def test_skewed_clock(offset_s: float, uncertainty_s: float, is_bad: bool | None) -> None:
    """Only what exceeds a limit by more than the uncertainty counts."""
    facts = [{"offset_s": 0.0, "uncertainty_s": 0.0}] * 3
    facts.append({"offset_s": offset_s, "uncertainty_s": uncertainty_s})
    found = list(clocks.judge(report(clocks=facts)))
    assert [finding.is_bad for finding in found] == ([] if is_bad is None else [is_bad])
    if is_bad:
        side = "ahead of" if offset_s > 0 else "behind"
        assert found[0].line() == (
            f"n3: its clock is 7 s {side} the driver's, at most "
            "cluster.preflight.max_clock_skew_s=5 expected; start its time service (chronyd, ntpd)"
        )


# --- storage


def stored(monkeypatch: pytest.MonkeyPatch, folders: list[Path], driver: Path) -> list[Any]:
    """What nodes with these folders find, where the driver's is `driver`."""
    monkeypatch.setattr(storage, "_SETTLE_S", 0.0)
    monkeypatch.setattr(storage, "_FILE_BYTES", 2**20)
    (driver / DRIVER).write_text("token")
    hosts = NODES[: len(folders)]
    places = [place(rank, hosts, GPU_SPEC, path) for rank, path in enumerate(folders)]
    heard: list[Any] = []
    for step in storage.CHECK.steps:
        heard = [step(where, heard) for where in places]
    return heard


def test_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = stored(monkeypatch, [tmp_path] * 3, tmp_path)
    assert all(fact["sees_driver"] and not fact["unseen"] for fact in facts)
    assert all(fact["write_mb_s"] > 0 and fact["read_mb_s"] > 0 for fact in facts)
    assert [path.name for path in tmp_path.iterdir()] == [DRIVER]
    spec = expecting(min_shm_gb=0, min_write_mb_s=0, min_read_mb_s=0, min_free_gb=0)
    assert list(storage.judge(report(spec, NODES[:3], storage=facts))) == []


def test_folder_that_one_node_does_not_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that does not see the driver's file is named, and nobody who does not see its."""
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    facts = stored(monkeypatch, [shared, own, shared], shared)
    spec = expecting(min_shm_gb=0, min_write_mb_s=0, min_read_mb_s=0, min_free_gb=0)
    assert lines(storage.judge(report(spec, NODES[:3], storage=facts))) == [
        "n1: the run's folder is not the driver's: it does not have the file that was just written "
        "there; mount the shared disk on it, or choose a shared run.dir"
    ]
    assert not own.exists()


def test_folder_that_is_not_there_or_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = stored(monkeypatch, [tmp_path, tmp_path / "no" / "probe"], tmp_path)
    assert facts[1]["problem"] == "cannot be written (No such file or directory)"
    assert facts[0]["unseen"] == []  # what was not written is not missed
    spec = expecting(min_shm_gb=0, min_write_mb_s=0, min_read_mb_s=0, min_free_gb=0)
    (line,) = lines(storage.judge(report(spec, NODES[:2], storage=facts)))
    assert line.startswith("n1: the run's folder is not the driver's")
    facts[1] |= {"sees_driver": True, "problem": "cannot be written (Read-only file system)"}
    (line,) = lines(storage.judge(report(spec, NODES[:2], storage=facts)))
    assert line.startswith("n1: the run's folder cannot be written (Read-only file system); have")


def test_slow_and_full_disks_and_little_shared_memory() -> None:
    fine = {
        "sees_driver": True, "unseen": [], "write_mb_s": 50.0, "read_mb_s": 50.0,
        "free_bytes": 1e9, "shm_bytes": 1e8,
    }  # fmt: skip
    assert list(storage.judge(report(storage=[fine] * 4))) == []
    facts = [
        {**fine, "read_mb_s": 49.0}, {**fine, "free_bytes": 5e8}, {**fine, "shm_bytes": 67108864},
        {**fine, "unseen": ["n0"]},
    ]  # fmt: skip
    found = list(storage.judge(report(storage=facts)))
    assert [line.split(" expected;")[0] for line in lines(found)] == [
        "n1: the run's folder has 0.5 GB, cluster.preflight.min_free_gb=1",
        "n2: /dev/shm holds 0.0671 GB, cluster.preflight.min_shm_gb=0.1",
        "n3: does not see in the run's folder what n0 wrote there 15 s before; have the shared "
        "disk's mount looked at",
    ]
    (line,) = lines(found, is_bad=False)
    assert line.startswith("n0: the run's folder is read at 49 MB/s, cluster.preflight.min_read_mb")


# --- network


def test_bus_bandwidth() -> None:
    assert network.bus_bandwidth(10**9, 2, 0.5) == pytest.approx(2.0)
    assert network.bus_bandwidth(10**9, 32, 1.0) == pytest.approx(2 * 31 / 32)


@pytest.mark.parametrize("num_nodes", range(2, 10))
def test_every_two_nodes_meet_once_and_at_the_same_time(num_nodes: int) -> None:
    met = [network.partners(node, num_nodes) for node in range(num_nodes)]
    for node, others in enumerate(met):
        assert sorted(o for o in others if o is not None) == [
            other for other in range(num_nodes) if other != node
        ]
        for turn, other in enumerate(others):
            assert other is None or met[other][turn] == node
    assert len({len(others) for others in met}) == 1


def speeds(slow: dict[frozenset[str], float], nodes: list[str] = NODES) -> dict[str, Any]:
    return {
        one: {other: slow.get(frozenset((one, other)), 10.0) for other in nodes if other != one}
        for one in nodes
    }


def test_slow_node_among_four_is_named() -> None:
    matrix = speeds({frozenset(("n2", other)): 1.0 for other in ("n0", "n1", "n3")})
    facts = [{"gb_s": 1.2, "pairs": matrix[node]} for node in NODES]
    spec = dataclasses.replace(expecting(min_all_reduce_gb_s=8.0), num_workers=4)
    assert lines(network.judge(report(spec, network=facts))) == [
        "n2: its network gives 1 GB/s, the median node's 10; all-reduce over 4 workers runs at 1.2 "
        "GB/s, 8 expected (cluster.preflight.min_all_reduce_gb_s); use another node"
    ]


@pytest.mark.parametrize(
    ("matrix", "slowest"),
    [
        (speeds({frozenset(("n1", "n3")): 0.5}), ("n1", "n3", 0.5)),  # a link, and no node
        (speeds({}), ("n0", "n1", 10.0)),
        (speeds({frozenset(("n0", "n1")): 0.5}, NODES[:2]), ("n0", "n1", 0.5)),  # one of two
        ({}, None),
    ],
)
def test_nobody_is_blamed_without_reason(matrix: dict[str, Any], slowest: Any) -> None:
    assert network.blame(matrix) == ([], slowest)


def test_slow_network_without_a_slow_node() -> None:
    facts: list[Any] = [{"gb_s": 4.9, "pairs": {"n1": 2.0}}, {"gb_s": 4.8, "pairs": {"n0": 2.1}}]
    (finding,) = network.judge(report(hosts=["n0", "n1"], network=facts))
    assert finding.node == ""
    assert finding.line().startswith(
        "all-reduce over 2 workers runs at 4.8 GB/s, 5 expected "
        "(cluster.preflight.min_all_reduce_gb_s); slowest between n0 and n1: 2 GB/s; see with"
    )
    fast = [{"gb_s": 5.0}, {"gb_s": 5.0}]
    assert list(network.judge(report(hosts=["n0", "n1"], network=fast))) == []
    assert list(network.judge(report(hosts=["n0"], network=[None]))) == []


def test_all_reduce_that_does_not_answer() -> None:
    problem = {"problem": "no answer within 60 s"}
    (finding,) = network.judge(report(network=[problem, problem, problem, problem]))
    assert finding.line().startswith("all-reduce over 4 workers: no answer within 60 s; see with")
    where = place(0, ["n0", "n1"], GPU_SPEC)
    where.facts["arithmetic"] = [{"is_right": True}, {"error": "CUDA error: unspecified"}]
    assert network.all_reduce(where, []) == {
        "problem": "not tried: the device of worker 1 does not answer"
    }


# --- all of them


def on_plain_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: ClusterSpec, on_event: OnEvent
) -> Report:
    """Two workers of this machine, each as if on a node of its own."""
    monkeypatch.setattr(examine, "node_name", lambda: f"n{os.environ['RANK']}")
    monkeypatch.setattr(storage, "_FILE_BYTES", 2**20)
    with PlainCluster(spec, on_event) as executor:
        return examine.examine(executor, spec, tmp_path)


ANYTHING = {
    "min_shm_gb": 0, "min_write_mb_s": 0, "min_read_mb_s": 0, "min_free_gb": 0,
    "max_clock_skew_s": 60,
}  # fmt: skip
"""limits that no machine fails, however busy"""


def test_two_workers_take_all_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []
    limits = PreflightSpec(**ANYTHING, min_all_reduce_gb_s=0)
    spec = ClusterSpec(executor="plain", preflight=limits)
    found = on_plain_workers(tmp_path, monkeypatch, spec, events.append)
    assert examine.judge(found) == []
    assert found.nodes == ["n0", "n1"]
    assert all(fact["gb_s"] > 0 and "pairs" not in fact for fact in found.facts["network"])
    done = [event["done"] for event in events if event["kind"] == "progress"]
    assert done[-1] == len(examine.CHECKS)
    assert list(tmp_path.iterdir()) == []
    head, *rows = examine.table(found)
    assert head.split()[:3] == ["NODE", "WORKERS", "TORCH"]
    assert [row.split()[:2] for row in rows] == [["n0", "1"], ["n1", "1"]]
    assert "GPUS" not in head
    columns = [head.index(title) for title in ("SOURCE", "CLOCK", "MATMUL", "ALL-REDUCE")]
    assert all(one < other for one, other in pairwise(columns))
    plain = json.loads(json.dumps(examine.record(found, [], 1.5)))
    assert plain["facts"]["versions"][1] == plain["facts"]["versions"][0]


def test_slow_all_reduce_has_every_two_nodes_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = PreflightSpec(**ANYTHING, min_all_reduce_gb_s=1e9)
    spec = ClusterSpec(executor="plain", preflight=limits)
    found = on_plain_workers(tmp_path, monkeypatch, spec, lambda event: None)
    assert [set(fact["pairs"]) for fact in found.facts["network"]] == [{"n1"}, {"n0"}]
    (finding,) = examine.judge(found)
    assert "1e+09 expected" in finding.fact and "slowest between n" in finding.fact


def test_a_check_that_fails_on_one_node_is_that_nodes_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others finish; of network and arithmetic nobody waits for a device that is gone."""

    def fails(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if os.environ["RANK"] == "1":
            raise RuntimeError("CUDA error: unspecified\nlaunch failure")
        return left.mm(other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", fails)
    spec = ClusterSpec(executor="plain", preflight=PreflightSpec(**ANYTHING))
    found = on_plain_workers(tmp_path, monkeypatch, spec, lambda event: None)
    first, second = lines(examine.judge(found))
    assert first == (
        "n1: worker 1: the check of arithmetic failed with RuntimeError: CUDA error: unspecified "
        "launch failure; mend it, or skip all checks with cluster.preflight.when=never"
    )
    assert second.startswith("all-reduce over 2 workers: not tried: the device of worker 1 does")
    assert "failed" in examine.table(found)[2].split()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"when": "sometimes"}, "cluster.preflight.when=sometimes: must be auto, always or never"),
        ({"timeout_s": -1.0}, "cluster.preflight.timeout_s=-1.0: must be at least 0"),
        ({"min_free_gb": float("nan")}, "cluster.preflight.min_free_gb=nan: must be at least 0"),
        ({"min_gpu_share": 1.5}, "cluster.preflight.min_gpu_share=1.5: must be at most 1"),
    ],
)
def test_limits_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PreflightSpec(**changes)
