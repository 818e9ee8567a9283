"""Whether every worker's device multiplies right, and as fast as the others'."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from cluster.preflight.check import Check, Finding, Place, Report, slow_ones

_SIZE = {"cuda": 4096, "cpu": 512}

_NUM_TIMED = {"cuda": 100, "cpu": 3}

_NUM_ROUNDS = 3

_LARGEST = 3  # of the whole numbers that are multiplied: sums stay exact in float32, also by TF32


def multiply(place: Place, heard: list[Any]) -> dict[str, Any]:
    """A product of whole numbers, checked exactly; then its time.

    Costs 0.1 s and 200 MB on a GPU, less on a CPU.
    """
    device, size = place.context.device, _SIZE[place.context.device]
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-_LARGEST, _LARGEST + 1, (size, size), generator=generator).float()
        for _ in range(2)
    )
    vector = torch.randint(-9, 10, (size, 1), generator=generator).double()
    expected = left.double() @ (right.double() @ vector)
    left, right = left.to(device), right.to(device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        first = left @ right
        is_right = torch.equal(first.cpu().double() @ vector, expected)
        taken_s = math.inf
        for _ in range(_NUM_ROUNDS):  # the clocks of an idle GPU rise in the first of them
            begun_s = _now_s(device)
            for _ in range(_NUM_TIMED[device]):
                last = left @ right
            taken_s = min(taken_s, (_now_s(device) - begun_s) / _NUM_TIMED[device])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "is_right": is_right and torch.equal(first, last),
        "tflops": 2 * size**3 / taken_s / 1e12,
    }


def _now_s(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def judge(report: Report) -> Iterator[Finding]:
    """A wrong product; a GPU much slower than most. CPUs that others share may be that slow."""
    facts = report.by_rank("arithmetic")
    for rank, fact in facts.items():
        if not fact["is_right"]:
            yield Finding(
                report.hosts[rank], f"worker {rank}: its {fact['device']} multiplies wrongly",
                "use another node",
            )  # fmt: skip
    if report.spec.uses_gpu:
        speeds = {rank: fact["tflops"] for rank, fact in facts.items()}
        median, slow = slow_ones(speeds, report.limits.min_gpu_share)
        for rank in slow:
            yield Finding(
                report.hosts[rank],
                f"worker {rank}: its GPU multiplies at {speeds[rank]:.0f} TFLOP/s, the median is "
                f"{median:.0f} and cluster.preflight.min_gpu_share={report.limits.min_gpu_share:g} "
                "of it expected",
                "use another node",
            )  # fmt: skip


def _cell(fact: dict[str, Any]) -> str:
    if not fact["is_right"]:
        return "WRONG"
    speed = fact["tflops"]
    return f"{speed:.3g} TF/s" if speed >= 1 else f"{1000 * speed:.3g} GF/s"


CHECK = Check(
    "arithmetic", (multiply,), judge, {"MATMUL": _cell},
    on_every_rank=True,
)  # fmt: skip
