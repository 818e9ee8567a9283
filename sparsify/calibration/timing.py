"""How far the walk is, and how long its work took; the clock is the caller's: maths reads none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


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


@dataclass(frozen=True)
class Progress:
    """What the walk tells its caller."""

    on_block: Callable[[int, nn.Module], None] = lambda index, block: None
    """called as on_block(index, block) after a block's layers are solved and the hidden states are
    before the next block; the block's weights are still there"""
    wait_for_pending: Callable[[], None] = lambda: None
    """called before the weights of solved layers are used"""
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    """collects the time of each kind of work"""
