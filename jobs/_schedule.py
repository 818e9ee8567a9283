"""How many steps a recovery has, and the learning rate of each."""

from __future__ import annotations

from conf.schema import Config
from conf.stages import DistillConfig


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
