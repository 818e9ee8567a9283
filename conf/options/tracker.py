"""Options tracker.*: Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.errors import InputError
from sparsify.params import check_options, option


@dataclass
class TrackerConfig:
    """Metrics: always a JSONL file in the run folder, and Weights & Biases on top."""

    wandb: str = option("auto", one_of=("auto", "online", "offline", "off"))
    """auto (online with a key, offline without), online, offline or off"""
    project: str = "twofour"
    """Weights & Biases project"""
    name: str | None = None
    """name of the run there; null = name of the run folder"""

    def __post_init__(self) -> None:
        check_options(self, "tracker")
        if bad := sorted(set(self.project) & set("/\\#?%:")):
            raise InputError(
                f"tracker.project={self.project}: Weights & Biases refuses {' '.join(bad)} in "
                "project names; use letters, digits, '-' and '_'"
            )
