"""How far each node's clock is from the driver's.

A run's time limit is a time of day that the driver knows and a worker waits for, and logs of all
nodes are read side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.preflight.check import Check, Finding, Place, Report

_NUM_CALLS = 20

_ODD_S = 0.5  # NTP keeps machines within some milliseconds


def look(place: Place, heard: list[Any]) -> dict[str, float]:
    """This node's clock minus the driver's, and how wrong that may be at most, in seconds."""
    offset_s, uncertainty_s = compare(time.time, place.context.driver_time, _NUM_CALLS)
    return {"offset_s": offset_s, "uncertainty_s": uncertainty_s}


def compare(
    ours: Callable[[], float], theirs: Callable[[], float], num_calls: int
) -> tuple[float, float]:
    """Our clock minus theirs, by the quickest of some calls, and half the time that it took.

    Their answer is of a moment between a call's begin and its end: it is compared with the middle.
    """
    best: tuple[float, float] | None = None
    for _ in range(num_calls):
        begun_s, their_s, ended_s = ours(), theirs(), ours()
        half_s = (ended_s - begun_s) / 2
        if half_s >= 0 and (best is None or half_s < best[1]):  # a clock may be set meanwhile
            best = begun_s + half_s - their_s, half_s
    if best is None:
        raise RuntimeError("the clock goes backwards")
    return best


def judge(report: Report) -> Iterator[Finding]:
    """Clocks that are surely wrong by more than the limit, or oddly wrong."""
    most_s = report.limits.max_clock_skew_s
    for node, fact in report.by_node("clocks").items():
        surely_s = abs(fact["offset_s"]) - fact["uncertainty_s"]
        if surely_s > min(most_s, _ODD_S):
            side = "ahead of" if fact["offset_s"] > 0 else "behind"
            yield Finding(
                node, f"its clock is {abs(fact['offset_s']):.3g} s {side} the driver's, at most "
                f"cluster.preflight.max_clock_skew_s={most_s:g} expected",
                "start its time service (chronyd, ntpd)", surely_s > most_s,
            )  # fmt: skip


def _cell(fact: dict[str, float]) -> str:
    scale, unit = (1, "s") if abs(fact["offset_s"]) >= 1 else (1000, "ms")
    return f"{scale * fact['offset_s']:+.1f}±{scale * fact['uncertainty_s']:.1f} {unit}"


CHECK = Check("clocks", (look,), judge, {"CLOCK": _cell})
