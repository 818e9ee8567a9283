"""How fast all workers add up a tensor, and, when that is too slow, which node it is.

The speed is the bus bandwidth: bytes that pass each worker's link and second, 2 (n - 1) / n times
the tensor's, which for a good network does not depend on the number of workers n.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cluster.preflight.check import Check, Finding, Place, Report

_NUM_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}

_PAIR_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}

_NUM_TIMED = {"cuda": 20, "cpu": 5}

_POLL_S = 0.0001

_SLOW_SHARE = 0.5  # of the median node's speed, below which a node stands out

_LEAST = {"cuda": 5.0, "cpu": 0.02}
"""GB/s where nobody says otherwise. GPUs: a network of 100 Gbit/s gives some 10, and less than half
of that means that NCCL has found no fast network; gloo on CPUs: any network at all."""


def least(report: Report) -> float:
    """GB/s that are expected."""
    asked = report.limits.min_all_reduce_gb_s
    return _LEAST["cuda" if report.spec.uses_gpu else "cpu"] if asked is None else asked


def all_reduce(place: Place, heard: list[Any]) -> dict[str, Any] | None:
    """GB/s of bus bandwidth as this rank sees it; None where there is nobody to speak with."""
    size = len(place.hosts)
    failed = [r for r, fact in enumerate(place.facts["arithmetic"]) if "error" in (fact or {})]
    if size == 1:
        return None
    if failed:  # their devices do not answer, and the others would wait for them
        return {"problem": f"not tried: the device of worker {failed[0]} does not answer"}
    limit_s = place.spec.preflight.timeout_s / 2
    # Of its own, so that it does not wait for as long as those of the work.
    group = dist.new_group(timeout=timedelta(seconds=place.spec.preflight.timeout_s))
    device = place.context.device
    tensor = torch.ones(_NUM_BYTES[device] // 4, device=device)
    deadline_s = time.monotonic() + limit_s
    try:
        if not _summed(tensor, group, 1, deadline_s):
            return {"problem": f"no answer within {limit_s:g} s"}
        if not bool((tensor == size).all()):
            return {"problem": f"the sum of {size} ones came out as {tensor.mean().item():g}"}
        begun_s = time.perf_counter()
        if not _summed(tensor, group, _NUM_TIMED[device], deadline_s):
            return {"problem": f"no answer within {limit_s:g} s"}
        taken_s = (time.perf_counter() - begun_s) / _NUM_TIMED[device]
    finally:
        dist.destroy_process_group(group)
    return {"gb_s": bus_bandwidth(tensor.nbytes, size, taken_s)}


def bus_bandwidth(num_bytes: int, size: int, taken_s: float) -> float:
    """GB/s through each of `size` workers' links while a tensor is added up over all of them."""
    return 2 * (size - 1) / size * num_bytes / taken_s / 1e9


def _summed(tensor: torch.Tensor, group: Any, times: int, deadline_s: float) -> bool:
    """Add the tensor up over all workers, so many times; False if that takes too long.

    gloo gives up by itself, with an error. NCCL would wait, and its watchdog end the process.
    """
    for _ in range(times):
        work = dist.all_reduce(tensor, group=group, async_op=tensor.is_cuda)
    while work is not None and not work.is_completed():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def pairs(place: Place, heard: list[Any]) -> dict[str, Any] | None:
    """Where the whole was too slow: GB/s between this rank's node and each other one as well.

    The nodes' first ranks meet in rounds, all at once, so that n nodes take n - 1 short exchanges.
    """
    found = heard[place.rank]
    if len(place.leaders) < 2 or not all(fact and "gb_s" in fact for fact in heard):
        return found
    if min(fact["gb_s"] for fact in heard) >= least(Report(place.spec, place.hosts, {})):
        return found
    group = dist.new_group(timeout=timedelta(seconds=place.spec.preflight.timeout_s))
    num_floats = _PAIR_BYTES[place.context.device] // 4
    out, into = (torch.ones(num_floats, device=place.context.device) for _ in range(2))
    dist.all_reduce(out[:1].clone(), group=group)  # NCCL wants all of a group to speak first
    speeds = {}
    if place.rank in place.leaders:
        for other in partners(place.leaders.index(place.rank), len(place.leaders)):
            if other is not None:
                rank = place.leaders[other]
                # The first exchange of two makes their connection.
                taken_s = [_exchange_s(out, into, rank, group) for _ in range(3)][1:]
                speeds[place.hosts[rank]] = out.nbytes / min(taken_s) / 1e9
    dist.barrier(group)
    dist.destroy_process_group(group)
    return {**found, "pairs": speeds}


def partners(ours: int, num_nodes: int) -> list[int | None]:
    """Whom a node meets in each round, so that every two meet once; None: it waits."""
    even = num_nodes + num_nodes % 2
    last = even - 1
    met: list[int | None] = []
    for turn in range(last):
        if ours == last:
            other = turn * even // 2 % last
        else:
            other = (turn - ours) % last
            other = last if other == ours else other
        met.append(other if other < num_nodes else None)
    return met


def _exchange_s(out: torch.Tensor, into: torch.Tensor, rank: int, group: Any) -> float:
    begun_s = time.perf_counter()
    calls = [
        dist.P2POp(call, tensor, rank, group)
        for call, tensor in ((dist.isend, out), (dist.irecv, into))
    ]
    for work in dist.batch_isend_irecv(calls):
        work.wait()
    if into.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun_s


def judge(report: Report) -> Iterator[Finding]:
    """An all-reduce that fails or is too slow, with the node that is to blame if one stands out."""
    facts = report.by_rank("network")
    if problem := next((f["problem"] for f in facts.values() if "problem" in f), None):
        yield Finding(
            "", f"all-reduce over {len(report.hosts)} workers: {problem}", _look_at(report)
        )
        return
    if not facts:
        return
    slowest = min(fact["gb_s"] for fact in facts.values())
    if slowest >= least(report):
        return
    fact = (
        f"all-reduce over {len(report.hosts)} workers runs at {slowest:.3g} GB/s, "
        f"{least(report):g} expected (cluster.preflight.min_all_reduce_gb_s)"
    )
    nodes, pair = blame(
        {n: f["pairs"] for n, f in report.by_node("network").items() if f.get("pairs")}
    )
    for node, speed, median in nodes:
        yield Finding(
            node, f"its network gives {speed:.3g} GB/s, the median node's {median:.3g}; {fact}",
            "use another node",
        )  # fmt: skip
    if not nodes:
        between = f"; slowest between {pair[0]} and {pair[1]}: {pair[2]:.3g} GB/s" if pair else ""
        yield Finding("", f"{fact}{between}", _look_at(report))


def blame(
    speeds: dict[str, dict[str, float]],
) -> tuple[list[tuple[str, float, float]], tuple[str, str, float] | None]:
    """Nodes that are slow with every other one, and the slowest pair.

    A node counts by the best of its pairs: with a slow one all are slow, a good one has at least
    one good pair where there are three nodes or more. Of two nodes none can be blamed.

    Args:
        speeds: node -> other node -> GB/s.

    Returns:
        (node, its speed, the median) of the slow ones; (node, node, GB/s), None without pairs.
    """
    slowest = min(
        ((one, other, s) for one, found in speeds.items() for other, s in found.items()),
        key=lambda pair: pair[2], default=None,
    )  # fmt: skip
    best = {node: max(found.values()) for node, found in speeds.items()}
    if len(best) < 3:
        return [], slowest
    median = statistics.median(best.values())
    slow = [(node, s, median) for node, s in best.items() if s < _SLOW_SHARE * median]
    return slow, slowest


def _look_at(report: Report) -> str:
    if not report.spec.uses_gpu:
        return "name the nodes' fast network with cluster.slurm.interface or GLOO_SOCKET_IFNAME"
    return (
        "see with NCCL_DEBUG=INFO which network NCCL uses; name it with cluster.slurm.interface or "
        "NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
    )


CHECK = Check(
    "network", (all_reduce, pairs), judge,
    {"ALL-REDUCE": lambda fact: f"{fact['gb_s']:.3g} GB/s" if "gb_s" in fact else "FAILED"},
    on_every_rank=True,
)  # fmt: skip
