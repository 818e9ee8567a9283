"""What a run shows on Ray's Prometheus endpoint: the table of its metrics, and their values now.

Imports no Ray; `cluster.runtime.export` hands the values to it. They are what workers tell the
driver for the terminal and the tracker anyway, so a step pays nothing for them.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

RAY_PREFIX = "ray_"
"""what Ray puts before the name of every metric"""


@dataclass(frozen=True)
class Metric:
    """A gauge; names and units as Prometheus has them: base units, ratios from 0 to 1."""

    name: str
    """without Ray's prefix"""
    text: str
    labels: tuple[str, ...] = ()
    """beside `run` and `stage`"""
    scale: float = 1.0
    """what the workers' figure is multiplied by"""


PROGRESS = (
    Metric("twofour_stage_progress_ratio", "Share of the stage's units that are done", ("unit",)),
    Metric("twofour_stage_units_done", "Blocks, steps, rows or files done", ("unit",)),
    Metric("twofour_stage_units", "Blocks, steps, rows or files in all", ("unit",)),
)
"""of every stage, by what it counts; they stay until the command ends"""

STEP = Metric("twofour_step", "Optimizer step that the figures of the stage are of")

FIGURES = {
    "tokens_per_s": Metric("twofour_tokens_per_second", "Tokens of the last step over its time"),
    "num_tokens": Metric("twofour_trained_tokens", "Tokens trained on"),
    "tflops_per_s": Metric(
        "twofour_flops_per_second", "Operations of the last step's rows over its time", scale=1e12
    ),
    "mfu": Metric("twofour_mfu_ratio", "Those over the peak of all GPUs; of known GPUs alone"),
    "goodput": Metric("twofour_goodput_ratio", "Time in steps that count over all time so far"),
    "loss": Metric("twofour_loss", "Loss of the last step"),
    "kl": Metric("twofour_kl_nats", "KL divergence from teacher to student, per token"),
    "ce": Metric("twofour_cross_entropy_nats", "Cross-entropy of the text, per token"),
    "agreement": Metric("twofour_agreement_ratio", "Tokens on which both models' best is the same"),
    "grad_norm": Metric("twofour_gradient_norm", "Norm of the whole gradient before clipping"),
    "learning_rate": Metric("twofour_learning_rate", "Learning rate of the last step"),
}
"""by what workers call them; they go when their stage ends"""

HELDOUT = {
    "heldout_ce": Metric("twofour_heldout_perplexity", "Of held-out text, per token", ("source",)),
    "heldout_kl": Metric("twofour_heldout_kl_nats", "Of held-out text, per token", ("source",)),
}
"""the same, by the source of the text"""

MEMORY = Metric("twofour_worker_peak_memory_bytes", "Most host memory a worker has held", ("rank",))

METRICS = (*PROGRESS, STEP, *FIGURES.values(), *HELDOUT.values(), MEMORY)
"""all there are"""

Sample = tuple[Metric, dict[str, str], float]
"""a metric, its labels, its value"""


class Values:
    """The values of a run's metrics; takes the events of its workers, from any thread.

    There are as many series as the run has stages, workers and sources of held-out text, whatever
    its length.

    Args:
        run: the run's name, the label `run`.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._values: dict[tuple[str, Metric, str], float] = {}

    def take(self, event: dict[str, Any]) -> None:
        """Take note of an event; those that say nothing here are passed over."""
        stage, kind = event.get("name"), event["kind"]
        if stage is None:
            return
        if kind == "progress":
            unit = event.get("text", "").partition(",")[0]
            done, total = event["done"], event["total"]
            shown = (done / total if total else 1.0, done, total)
            self._set(stage, [(metric, unit, v) for metric, v in zip(PROGRESS, shown, strict=True)])
        elif kind == "metrics":
            found = [one for key, v in event["values"].items() for one in _known(stage, key, v)]
            if found and event["step"] is not None:
                found.append((STEP, "", event["step"]))
            self._set(stage, found)
        elif kind == "memory":
            self._set(stage, [(MEMORY, str(event["rank"]), event["peak_bytes"])])

    def end(self, stage: str) -> None:
        """The stage's workers have gone, and with them all but how far they came."""
        with self._lock:
            for key in [k for k in self._values if k[0] == stage and k[1] not in PROGRESS]:
                del self._values[key]

    def samples(self) -> list[Sample]:
        """The values of this moment."""
        with self._lock:
            items = list(self._values.items())
        return [
            (metric, {"run": self._run, "stage": stage, **dict.fromkeys(metric.labels, own)}, value)
            for (stage, metric, own), value in items
        ]

    def _set(self, stage: str, found: list[tuple[Metric, str, float]]) -> None:
        with self._lock:
            for metric, own, value in found:
                if math.isfinite(value):
                    self._values[stage, metric, own] = float(value)
                else:  # a bad step's: what was before is no longer so
                    self._values.pop((stage, metric, own), None)


def _known(stage: str, key: str, value: Any) -> list[tuple[Metric, str, float]]:
    """STAGE/FIGURE or STAGE/FIGURE/SOURCE as a metric, its own label and its value; or nothing."""
    owner, _, name = key.partition("/")
    figure, _, source = name.partition("/")
    if owner != stage or not isinstance(value, int | float):
        return []
    if name in FIGURES:
        return [(FIGURES[name], "", value * FIGURES[name].scale)]
    if source and figure in HELDOUT:
        return [(HELDOUT[figure], source, _perplexity(value) if figure == "heldout_ce" else value)]
    return []


def _perplexity(cross_entropy: float) -> float:
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf
