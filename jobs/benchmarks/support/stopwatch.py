"""Where the time of a call goes, by wrapping the methods that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jobs.benchmarks.support.device import now_s
from sparsify.pruning.progress import LayerReport


def phase_seconds(layers: Iterable[LayerReport]) -> dict[str, float]:
    """Seconds by phase of the pruning of some layers."""
    phases: dict[str, float] = {}
    for layer in layers:
        for phase, seconds in layer.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    return phases


class Stopwatch:
    """Seconds by phase; a phase inside another one is taken from it.

    A GPU is waited for at every change of phase, so what is watched takes longer than it would.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, device: str) -> None:
        self.is_on = False
        self.seconds: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self._since_s = 0.0

    def watch(self, owner: Any, method: str, phase: str) -> None:
        """Time `owner.method` as `phase` from here on, where the watch is on."""
        inner = getattr(owner, method)
        setattr(owner, method, self.around(inner, phase))

    def around(self, inner: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """`inner` with its time taken."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.is_on:
                return inner(*args, **kwargs)
            self._turn(phase)
            try:
                return inner(*args, **kwargs)
            finally:
                self._turn(None)

        return timed

    def _turn(self, phase: str | None) -> None:
        """Enter a phase, or leave the one that was entered last."""
        at_s = now_s(self._device)
        if self._open:
            last = self._open[-1]
            self.seconds[last] = self.seconds.get(last, 0.0) + at_s - self._since_s
        self._since_s = at_s
        if phase is None:
            self._open.pop()
        else:
            self._open.append(phase)


def mean_phases(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Phase -> the mean of what it took in some blocks, none in those that lack it."""
    names = dict.fromkeys(name for phases in blocks for name in phases)
    return {name: sum(phases.get(name, 0.0) for phases in blocks) / len(blocks) for name in names}
