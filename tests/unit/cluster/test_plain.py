"""Work on plain processes: what comes back, in which order, and how it ends when a worker does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from cluster.errors import ClusterError, WorkFailedError
from cluster.plain import PlainCluster, _Start
from cluster.spec import ClusterSpec
from jobs.runs.folder import run_lock
from sparsify.errors import InputError

Events = list[dict[str, Any]]


def cluster(num_workers: int, events: Events | None = None) -> PlainCluster:
    told: Events = [] if events is None else events
    return PlainCluster(ClusterSpec(num_workers=num_workers, executor="plain"), told.append)


def sum_of_ranks(context: Any, payload: float) -> tuple[int, float]:
    context.progress(1, 1, "summed")
    values = torch.tensor([payload + context.rank])
    dist.all_reduce(values)
    return os.getpid(), float(values)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_form_a_group_and_rank_0_answers(num_workers: int, tmp_path: Path) -> None:
    events: Events = []
    with cluster(num_workers, events) as plain:
        pid, total = plain.run_workers("sum", sum_of_ranks, 10.0, tmp_path)
    assert total == sum(10.0 + rank for rank in range(num_workers))
    assert (pid == os.getpid()) == (num_workers == 1)  # one worker: a debugger works
    memory = [event for event in events if event["kind"] == "memory"]
    assert sorted(event["rank"] for event in memory) == list(range(num_workers))
    rest = [event for event in events if event not in memory]
    assert rest == [{"kind": "progress", "name": "sum", "done": 1, "total": 1, "text": "summed"}]
    assert not dist.is_initialized()


def square(context: Any, payload: int) -> int:
    time.sleep(0.05 * (3 - payload))  # the last is done first
    return payload * payload


def three_steps(context: Any, payload: int) -> int:
    for step in range(payload):
        context.progress(step + 1, 3)
        time.sleep(0.3)  # else the second is not said
    return payload


@pytest.mark.parametrize("num_workers", [1, 2])
def test_steps_of_tasks_add_up(num_workers: int) -> None:
    events: Events = []
    with cluster(num_workers, events) as plain:
        assert plain.run_tasks("steps", three_steps, [3, 1, 2], "shares", 3) == [3, 1, 2]
    told = [event for event in events if event["kind"] == "progress"]
    assert all(event["total"] == 9 and event["text"] == "shares" for event in told)
    done = [event["done"] for event in told]
    assert done == sorted(done) and done[-1] == 9
    assert {1, 2} <= set(done), "before the first has ended"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_of_tasks_come_in_their_order(num_workers: int) -> None:
    events: Events = []
    with cluster(num_workers, events) as plain:
        assert plain.run_tasks("square", square, [0, 1, 2, 3], "numbers") == [0, 1, 4, 9]
        assert plain.run_tasks("square", square, [], "numbers") == []
    done = [(event["done"], event["total"], event["text"]) for event in events]
    assert done == [(count, 4, "numbers") for count in (1, 2, 3, 4)]


def fail_on_last(context: Any, payload: int) -> None:
    if context.rank == payload:
        raise KeyError(f"no layer {context.rank}")
    if context.world_size > 1:
        dist.barrier()  # the others wait for it, and then miss it


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_works_own_error_comes_back_and_nobody_waits(num_workers: int, tmp_path: Path) -> None:
    before = psutil.Process().children()
    with cluster(num_workers) as plain, pytest.raises(WorkFailedError, match="no layer") as caught:
        plain.run_workers("fail", fail_on_last, num_workers - 1, tmp_path)
    assert caught.value.kind == "KeyError"
    assert "fail_on_last" in caught.value.traceback
    assert psutil.Process().children() == before


def die(context: Any, payload: int) -> None:
    if context.rank == payload:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_a_lost_worker_ends_the_others(tmp_path: Path) -> None:
    before = psutil.Process().children()
    with cluster(2) as plain, pytest.raises(WorkFailedError, match=r"exit code -9.*same command"):
        plain.run_workers("die", die, 1, tmp_path)
    assert psutil.Process().children() == before


def test_more_than_one_machine_is_refused() -> None:
    with pytest.raises(ClusterError, match="this machine alone"):
        PlainCluster(ClusterSpec(num_nodes=2, executor="plain"), print).__enter__()
    with pytest.raises(ValueError, match="executor=slurm: must be ray or plain"):
        ClusterSpec(executor="slurm")


_DRIVER = """
import time
from pathlib import Path
from cluster.plain import PlainCluster
from cluster.spec import ClusterSpec
def wait(context, payload):
    context.say("here")
    time.sleep(600)
with PlainCluster(ClusterSpec(executor="plain"), lambda e: print(e["text"], flush=True)) as plain:
    plain.run_tasks("wait", wait, [0, 1], "")
"""


def test_workers_do_not_outlive_a_killed_driver() -> None:
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER], stdout=subprocess.PIPE)
    assert driver.stdout is not None
    assert [driver.stdout.readline() for _ in range(2)] == [b"here\n"] * 2
    workers = psutil.Process(driver.pid).children()
    assert len(workers) == 2
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def _sleep(context: Any, payload: float) -> None:
    time.sleep(payload)


def test_a_worker_whose_driver_died_before_it_began_ends() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    start = _Start(ClusterSpec(executor="plain"), "wait", 0, 1, _sleep, 600, None)
    ours, theirs = Pipe(duplex=False)
    worker = get_context("fork").Process(target=start.run_forked, args=(theirs, 0, gone.pid))
    worker.start()
    worker.join(30)
    assert worker.exitcode == 1
    ours.close()


def test_a_folder_is_free_when_the_workers_of_a_killed_command_have_ended(tmp_path: Path) -> None:
    """Its lock goes with the last of them: two runs never write into one folder."""
    code = _DRIVER.replace("with PlainCluster", "import pathlib\nfrom jobs.runs.folder import "
                           "run_lock\nwith run_lock(pathlib.Path('.')), PlainCluster")  # fmt: skip
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"here\n"
    with pytest.raises(InputError, match="is using it"), run_lock(tmp_path):
        pass
    driver.kill()
    driver.wait()
    with run_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
