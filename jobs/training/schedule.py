"""How many steps a recovery has, and the learning rate of each; without torch."""

from __future__ import annotations

from conf.options.distill import DistillConfig
from conf.schema import Config

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
