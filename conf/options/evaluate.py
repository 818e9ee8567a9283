"""Options evaluate.*: held-out text and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.params import check_options, option


@dataclass
class EvaluateConfig:
    """Perplexity and agreement with the dense model on held-out text."""

    num_tokens: int = option(65_536, low=1)
    """held-out tokens scored, at most"""
    batch_size: int = option(8, low=1, speed_only=True)
    """rows per forward on one worker; changes memory and speed only"""

    def __post_init__(self) -> None:
        check_options(self, "evaluate")
