"""How many steps a recovery has, the learning rate of each, and where its curve is going."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conf.options.distill import DistillConfig
from conf.schema import Config

if TYPE_CHECKING:  # costs torch, and `jobs.forecast` reads rates without it
    from sparsify.training.forecast import Forecast

FORECAST_SHARES = tuple(tenth / 10 for tenth in range(3, 10))
"""shares of a run after which its end is forecast"""

_FINAL_SHARE = 0.05  # of the steps, at the end, whose mean is forecast


def num_steps(config: Config) -> int:
    """Optimizer steps of the whole recovery."""
    return config.distill.num_tokens // (config.distill.batch_size * config.data.sequence_length)


def learning_rate(settings: DistillConfig, step: int, total: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then linear decay to the smallest share."""
    warmup = min(settings.num_warmup_steps, total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    least = settings.min_learning_rate_share
    return settings.learning_rate * (least + (1 - least) * left)


def planned_rates(settings: DistillConfig, total: int) -> list[float]:
    """The learning rate of every step."""
    return [learning_rate(settings, step, total) for step in range(total)]


def num_final_steps(total: int) -> int:
    """Steps at the end whose mean is what a forecast is of."""
    return max(1, int(_FINAL_SHARE * total))


def forecast_of(curve: Sequence[dict[str, Any]], rates: Sequence[float]) -> Forecast:
    """Where the training KL of a run will end, from its steps so far."""
    from sparsify.training.forecast import forecast

    sound = (one for one in curve if not one["is_skipped"])  # the others may have no figures
    points = [(one["step"], one["kl"]) for one in sound if one["kl"] > 0]
    return forecast(
        [step for step, _ in points], [kl for _, kl in points], rates, num_final_steps(len(rates))
    )


def early_forecast(settings: DistillConfig, curve: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the first part of a finished run let expect; the report draws it beside what came."""
    part = curve[: round(FORECAST_SHARES[0] * len(curve))]
    return forecast_of(part, planned_rates(settings, len(curve))).as_dict()
