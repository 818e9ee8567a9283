"""How often to save: Young's formula.

A checkpoint costs its stall, a failure costs what was done since the last one: half an interval on
average. With C the stall and M the mean time between failures, an interval tau loses the share
C / tau + tau / (2 M), least at tau = sqrt(2 C M) (Young 1974, equation 3), where it is
sqrt(2 C / M). It is good to first order, for C much smaller than M; the time of a restart is lost
at any interval and does not enter.
"""

from __future__ import annotations

import math

from sparsify.errors import InputError


def young_interval_s(stall_s: float, mtbf_s: float) -> float:
    """The interval between checkpoints that loses least, in seconds.

    Args:
        stall_s: time that training stands still for one checkpoint, > 0.
        mtbf_s: mean time between failures of the whole job, > 0.
    """
    if not (stall_s > 0 and mtbf_s > 0 and math.isfinite(stall_s * mtbf_s)):
        raise InputError(f"checkpoint interval: {stall_s=} and {mtbf_s=} must be numbers > 0")
    return math.sqrt(2 * stall_s * mtbf_s)


def checkpoint_interval_steps(
    stall_s: float, step_s: float, mtbf_s: float, least: int = 1, most: int | None = None
) -> int:
    """Young's interval in optimizer steps.

    Ranks that measure their own times must agree on one result before they use it.

    Args:
        stall_s: measured stall of one checkpoint; one too short to measure gives `least`.
        step_s: measured time of one optimizer step, > 0.
        mtbf_s: mean time between failures of the whole job, > 0.
        least: smallest result, at least 1: a checkpoint that is still being written in the
            background must be done before the next one.
        most: largest result (what may be lost at most); None: no limit.

    Returns:
        Steps, rounded to the nearest whole number within the limits.
    """
    if not (step_s > 0 and math.isfinite(step_s)):
        raise InputError(f"checkpoint interval: {step_s=} must be a number > 0")
    if least < 1 or (most is not None and most < least):
        raise InputError(f"checkpoint interval: limits {least} to {most}; 1 <= least <= most")
    steps = least if stall_s == 0 else round(young_interval_s(stall_s, mtbf_s) / step_s)
    return max(least, steps if most is None else min(most, steps))
