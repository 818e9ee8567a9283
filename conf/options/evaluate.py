"""Options evaluate.*: held-out text and how much of it, and what the models write."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.params import check_options, option


@dataclass
class EvaluateConfig:
    """Perplexity and agreement with the dense model on held-out text, and a text of each model."""

    num_tokens: int = option(65_536, low=1)
    """held-out tokens scored, at most"""
    batch_size: int = option(8, low=1, speed_only=True)
    """rows per forward on one worker; changes memory and speed only"""

    prompt: str | None = option(None)
    """what every model continues; null = the beginning of the held-out text"""
    num_new_tokens: int = option(48, low=0)
    """tokens that every model writes after the prompt, at most; 0 = none"""
    temperature: float = option(0.7, low=0)
    """of sampling those tokens, with run.seed; 0 = always the likeliest"""

    def __post_init__(self) -> None:
        check_options(self, "evaluate")
