"""Which failures are worth another try: the memory of a driver that restarts its workers.

A lost machine deserves a restart. The same exception at the same step does not: it will come again,
and every further try costs the time since the last checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# What differs between two tries that failed alike: addresses in memory, ports and process ids.
_VOLATILE = re.compile(r"0x[0-9a-fA-F]+|\bpid[ =:]*\d+|(?<=:)\d{4,5}\b|\bid [0-9a-f]{8,}\b")
_MOST_KEPT = 50


@dataclass(frozen=True)
class Decision:
    """Whether to start again, and why or why not."""

    retry: bool
    reason: str


class FailureLog:
    """Decides after each failure of a run, and carries its memory over restarts of the driver.

    Two budgets. A failure of the machines (a worker lost, a hang) is retried `max_retries` times,
    counted anew whenever the run has got further than it had at any failure before. An exception of
    the work itself is retried once, since it may be a passing fault of a machine too; the same one
    at the same step a second time, or one at all that only the user can mend, is final.

    Args:
        max_retries: tries without progress, at least 0.
    """

    def __init__(self, max_retries: int) -> None:
        if max_retries < 0:
            raise ValueError(f"max_retries={max_retries}: must be at least 0")
        self.max_retries = max_retries
        self._failures: list[dict[str, Any]] = []
        self._num_without_progress = 0
        self._furthest_step = -1

    def record(
        self,
        kind: str,
        message: str,
        step: int | None,
        is_infrastructure: bool,
        is_users: bool = False,
    ) -> Decision:
        """Note a failure and decide.

        Args:
            kind: class of the exception, or a word for what was lost.
            message: its text; addresses, ports and process ids in it do not count.
            step: last step that was committed (of the checkpoint, or of the step it happened in,
                but always the same of the two); None before the first.
            is_infrastructure: the machines failed, not the work.
            is_users: only another config or input can mend it.
        """
        text = _VOLATILE.sub("*", message)
        failure = {"kind": kind, "message": text, "step": step}
        at = "before the first step" if step is None else f"at step {step}"
        is_known = not is_infrastructure and failure in self._failures
        self._failures = [*self._failures, failure][-_MOST_KEPT:]
        if is_users:
            return Decision(False, f"{kind} is for the user to mend; not retried")
        if is_known:
            return Decision(
                False, f"the same {kind} {at} for the second time: it would come again; not retried"
            )
        reached = -1 if step is None else step
        if reached > self._furthest_step:
            self._furthest_step, self._num_without_progress = reached, 0
        self._num_without_progress += 1
        if self._num_without_progress > self.max_retries:
            return Decision(
                False,
                f"{self._num_without_progress} failures without progress since "
                f"{'the start' if self._furthest_step < 0 else f'step {self._furthest_step}'}, "
                f"{self.max_retries} retries are allowed; not retried",
            )
        left = self.max_retries - self._num_without_progress
        return Decision(True, f"{kind} {at}; retried, {left} more without progress")

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a file beside the checkpoints."""
        return {
            "failures": self._failures,
            "num_without_progress": self._num_without_progress,
            "furthest_step": self._furthest_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._failures = list(state["failures"])
        self._num_without_progress = state["num_without_progress"]
        self._furthest_step = state["furthest_step"]
