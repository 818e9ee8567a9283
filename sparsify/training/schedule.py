"""The learning rate over a run: linear warm-up, then linear decay; without torch."""

from __future__ import annotations


def learning_rate(
    peak: float, step: int, num_steps: int, num_warmup_steps: int, least_share: float = 0.0
) -> float:
    """Rate of step `step` (from 0): up to `peak`, then down to what is reached one step too late.

    Args:
        peak: the rate at the end of the warm-up.
        step: below `num_steps`.
        num_steps: of the run.
        num_warmup_steps: of the warm-up.
        least_share: share of the peak that the decay ends at.
    """
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    left = (num_steps - step) / max(1, num_steps - num_warmup_steps)
    return peak * (least_share + (1 - least_share) * left)
