"""How long each kind of work took; the clock is the caller's, so that the maths reads none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Seconds by phase.

    Args:
        clock: returns seconds; None measures nothing.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock = clock

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time of what is done inside to `phase`.

        On a GPU it waits at both ends for the stream that it is on, and for no other: what is done
        ahead on another one continues.
        """
        if self._clock is None:
            yield
            return
        started_s = self._now()
        try:
            yield
        finally:
            self.seconds[phase] += self._now() - started_s

    def _now(self) -> float:
        assert self._clock is not None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return self._clock()

    def take(self) -> dict[str, float]:
        """The seconds since the last call, which are then forgotten."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken
