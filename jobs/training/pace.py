"""How fast a recovery goes, where its time went, when to save, and where its curve will end."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from cluster.runtime.worker import WorkerContext
from conf.options.distill import DistillConfig
from jobs.training.ledger import Ledger, goodput, read_ledger
from jobs.training.schedule import num_final_steps, planned_rates
from sparsify.costs.flops import mfu, peak_flops
from sparsify.costs.young import checkpoint_interval_steps
from sparsify.files import write_json
from sparsify.training.forecast import Forecast, forecast

FORECAST_SHARES = tuple(tenth / 10 for tenth in range(3, 10))
"""shares of a run after which its end is forecast"""

LEDGER = "ledger.jsonl"

_BEGUN = "begun"

_PROBE_STEPS = 20  # until the first checkpoint by Young's formula, whose stall is measured then

_NUM_REMEMBERED = 50


class Pace:
    """One worker's clock; rank 0's keeps the ledger and says how the run goes.

    Args:
        context: this worker.
        settings: batch size and how to space checkpoints.
        scratch: the stage's scratch folder, where the ledger is.
        sequence_length: tokens per row.
    """

    def __init__(
        self, context: WorkerContext, settings: DistillConfig, scratch: Path, sequence_length: int
    ) -> None:
        self.trained_s = 0.0
        self._context, self._settings, self._scratch = context, settings, scratch
        self._step_tokens = settings.batch_size * sequence_length
        self._steps_s: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        self._stall_s: float | None = None
        self._saved_at = 0
        is_gpu = context.device == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name()) if is_gpu else None
        begun = scratch / _BEGUN
        self._ledger: Ledger | None = None
        self.begun_s = time.time()  # only rank 0 asks for it
        if context.rank == 0:
            if not begun.is_file():
                write_json(begun, self.begun_s)  # whole or absent: a kill may come here too
            self.begun_s = float(begun.read_text("utf-8"))
            self._ledger = Ledger(scratch / LEDGER, context.warn)

    def interval(self, kind: str) -> AbstractContextManager[None]:
        """Around work that is no step, for the ledger."""
        return self._ledger.interval(kind) if self._ledger else contextlib.nullcontext()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`, from 1."""
        begun_s = time.monotonic()
        with self._ledger.step(number) if self._ledger else contextlib.nullcontext():
            yield
        step_s = time.monotonic() - begun_s
        self._steps_s.append(step_s)
        self.trained_s += step_s

    def resumed(self, step: int, trained_s: float) -> None:
        """Continue after a checkpoint."""
        self.trained_s, self._saved_at = trained_s, step

    def saved(self, step: int, stall_s: float) -> None:
        """A checkpoint was taken; training stood still for `stall_s`."""
        self._saved_at, self._stall_s = step, stall_s
        if self._ledger is not None:
            self._ledger.commit()

    def wants_checkpoint(self, step: int) -> bool:
        """Whether Young's interval since the last one is over; only rank 0's answer counts."""
        if self._settings.checkpoint_every_steps is not None or not self._steps_s:
            return False
        if self._stall_s is None:
            return step - self._saved_at >= _PROBE_STEPS
        step_s = statistics.median(self._steps_s)
        mtbf_s = self._settings.mtbf_hours * 3600
        return step - self._saved_at >= checkpoint_interval_steps(self._stall_s, step_s, mtbf_s)

    @property
    def step_s(self) -> float:
        """Median time of the last steps; 0 before the first."""
        return statistics.median(self._steps_s) if self._steps_s else 0.0

    def say(self, step: int, total: int, figures: dict[str, Any], flops: float) -> None:
        """Progress for the terminal, and the step's figures for the tracker.

        Args:
            step: steps done.
            total: steps of the run.
            figures: of the step.
            flops: what the step's rows ask for on all workers; 0 where it is not known.
        """
        tokens_per_s = self._step_tokens / max(self._steps_s[-1], 1e-9)
        loss = "not finite" if figures["loss"] is None else f"{figures['loss']:.4f}"
        text = f"steps, loss {loss}, {tokens_per_s:,.0f} tokens/s"
        speed = {"tokens_per_s": tokens_per_s, "goodput": self._goodput()}
        if flops:
            speed["tflops_per_s"] = flops / self._steps_s[-1] / 1e12
        if flops and self._peak:
            per_token = flops / self._step_tokens
            speed["mfu"] = mfu(tokens_per_s, per_token, self._peak, self._context.world_size)
            text += f", MFU {speed['mfu']:.1%}"
        self._context.progress(step, total, text)
        values = {k: v for k, v in figures.items() if k not in ("step", "row_crc")}
        values = {k: v for k, v in (values | speed).items() if v is not None}
        self._context.metrics({f"{self._context.name}/{k}": v for k, v in values.items()}, step)

    def _goodput(self) -> float:
        """Share of the time since the stage first began that went into steps that count.

        Those since a checkpoint are out again once they were lost. The record's goodput, from the
        ledger, also counts the loop's own moments between two steps.
        """
        return self.trained_s / max(time.time() - self.begun_s, self.trained_s, 1e-9)

    def forecast(self, curve: Sequence[dict[str, Any]], rates: Sequence[float]) -> None:
        """Every tenth of the run from a third on, tell the tracker where it will end."""
        asked = {round(share * len(rates)) for share in FORECAST_SHARES}
        if self._context.rank or len(curve) not in asked:
            return
        found = forecast_of(curve, rates)
        if found.predicted is not None:
            values = {"predicted": found.predicted, "low": found.low, "high": found.high}
            named = {
                f"{self._context.name}/forecast_{name}": value for name, value in values.items()
            }
            self._context.metrics(named, len(curve))

    def summary(self) -> dict[str, Any] | None:
        """Rank 0: where the stage's time went so far, over all its starts."""
        if self._ledger is None:
            return None
        self._ledger.close()
        intervals, _ = read_ledger(self._scratch / LEDGER)
        return goodput(intervals, self.begun_s, time.time())


def forecast_of(curve: Sequence[dict[str, Any]], rates: Sequence[float]) -> Forecast:
    """Where the training KL of a run will end, from its steps so far."""
    sound = (one for one in curve if not one["is_skipped"])  # the others may have no figures
    points = [(one["step"], one["kl"]) for one in sound if one["kl"] and one["kl"] > 0]
    return forecast(
        [step for step, _ in points], [kl for _, kl in points], rates, num_final_steps(len(rates))
    )


def early_forecast(settings: DistillConfig, curve: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the first part of a finished run let expect; the report draws it beside what came."""
    part = curve[: round(FORECAST_SHARES[0] * len(curve))]
    return forecast_of(part, planned_rates(settings, len(curve))).as_dict()
