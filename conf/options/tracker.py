"""Options tracker.*: Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass

from conf import checks as rules
from sparsify.errors import InputError


@dataclass
class TrackerConfig:
    """Metrics: always a JSONL file in the run folder, and Weights & Biases on top."""

    wandb: str = "auto"
    """auto (online with a key, offline without), online, offline or off"""
    project: str = "twofour"
    """Weights & Biases project"""
    name: str | None = None
    """name of the run there; null = name of the run folder"""

    def __post_init__(self) -> None:
        rules.one_of("tracker.wandb", self.wandb, ("auto", "online", "offline", "off"))
        rules.not_blank("tracker.project", self.project)
        rules.not_blank("tracker.name", self.name, optional=True)
        if bad := sorted(set(self.project) & set("/\\#?%:")):
            raise InputError(
                f"tracker.project={self.project}: Weights & Biases refuses {' '.join(bad)} in "
                "project names; use letters, digits, '-' and '_'"
            )
