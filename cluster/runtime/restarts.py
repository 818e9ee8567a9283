"""How often a group of workers that was lost is started again."""

from __future__ import annotations


class Restarts:
    """Decides after each loss of a worker whether the group is started again.

    That is done `most` times, counted from the start again whenever the work has got further than
    at any loss before. An exception of the work itself is no loss: it would come again.

    Args:
        most: restarts without progress, at least 0.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_without_progress = 0
        self._furthest = -1

    def after_loss(self, step: int | None) -> tuple[bool, str]:
        """Whether to start again, and why or why not; `step`: the last one done, None before it."""
        at = "before the first step" if step is None else f"at step {step}"
        reached = -1 if step is None else step
        if reached > self._furthest:
            self._furthest, self._num_without_progress = reached, 0
        self._num_without_progress += 1
        if self._num_without_progress > self._most:
            since = "the start" if self._furthest < 0 else f"step {self._furthest}"
            return False, (
                f"{self._num_without_progress} failures without progress since {since}, "
                f"{self._most} retries are allowed; not retried"
            )
        left = self._most - self._num_without_progress
        return True, f"worker lost {at}; retried, {left} more without progress"
