"""Puts a run's metrics on Ray's Prometheus endpoint, for as long as the run uses Ray."""

from __future__ import annotations

import threading

from ray.util.metrics import Gauge

from cluster.metrics import METRICS, Values

_EVERY_S = 1.0
"""the least after which Ray sends on, once each, what it was told (10 s unless told otherwise)"""


class Export:
    """A thread that hands the values of this moment to Ray, again and again: Ray forgets a value
    that it has not been told for two such times, and so all of them after the command has ended.

    Begins when Ray is there.

    Args:
        values: what to show.
    """

    def __init__(self, values: Values) -> None:
        self._values = values
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="metrics")
        self._thread.start()

    def end(self, wait: bool) -> None:
        """Hand over nothing more; `wait` until that is so, which without Ray may be never."""
        self._stop.set()
        if wait:
            self._thread.join()

    def _run(self) -> None:
        gauges = {m.name: Gauge(m.name, m.text, ("run", "stage", *m.labels)) for m in METRICS}
        while not self._stop.wait(_EVERY_S):
            for metric, labels, value in self._values.samples():
                gauges[metric.name].set(value, labels)
