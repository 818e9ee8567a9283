"""How many steps a recovery has, and the learning rate of each; without torch."""

from __future__ import annotations

from conf.options.distill import DistillConfig
from conf.schema import Config
from sparsify.training.schedule import learning_rate

_FINAL_SHARE = 0.05  # of the steps, at the end, whose mean is forecast


def num_steps(config: Config) -> int:
    """Optimizer steps of the whole recovery."""
    return config.distill.num_tokens // (config.distill.batch_size * config.data.sequence_length)


def planned_rates(settings: DistillConfig, total: int) -> list[float]:
    """The learning rate of every step of `total`."""
    warmup, least = min(settings.num_warmup_steps, total), settings.min_learning_rate_share
    return [
        learning_rate(settings.learning_rate, step, total, warmup, least) for step in range(total)
    ]


def num_final_steps(total: int) -> int:
    """Steps at the end whose mean is what a forecast is of."""
    return max(1, int(_FINAL_SHARE * total))
