"""Options evaluate.*: held-out text and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from conf import checks as rules


@dataclass
class EvaluateConfig:
    """Perplexity and agreement with the dense model on held-out text."""

    num_tokens: int = 65_536
    """held-out tokens scored, at most"""
    batch_size: int = 8
    """rows per forward on one worker; changes memory and speed only"""

    def __post_init__(self) -> None:
        rules.in_range("evaluate.num_tokens", self.num_tokens, low=1)
        rules.in_range("evaluate.batch_size", self.batch_size, low=1)
