"""How often to save: Young's formula.

A checkpoint costs its stall, a failure costs what was done since the last one: half an interval on
average. With C the stall and M the mean time between failures, an interval tau loses the share
C / tau + tau / (2 M), least at tau = sqrt(2 C M) (Young 1974, equation 3), where it is
sqrt(2 C / M). It is good to first order, for C much smaller than M; the time of a restart is lost
at any interval and does not enter.
"""

from __future__ import annotations

import math


def checkpoint_interval_steps(stall_s: float, step_s: float, mtbf_s: float) -> int:
    """The interval between checkpoints that loses least, in optimizer steps; at least 1.

    Args:
        stall_s: time that training pauses for one checkpoint, >= 0.
        step_s: of one optimizer step, > 0.
        mtbf_s: mean time between failures of the whole job, > 0.
    """
    return max(1, round(math.sqrt(2 * stall_s * mtbf_s) / step_s))
