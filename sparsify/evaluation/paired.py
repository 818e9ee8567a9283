"""Scores of models on the same documents, compared: recovery, difference, and what chance does.

The interval is that of a paired bootstrap: documents are drawn with replacement, the same ones for
every model, and the scores are taken again. Scores of two models on the same documents rise and
fall together, so that their two standard errors say too much of the difference.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000

COVERAGE = 0.95
"""of the intervals"""

_CHUNK = 1 << 22  # drawn documents in memory at once

LINKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda ratio: ratio,
    "exp": lambda ratio: np.exp(-ratio),
    "bits": lambda ratio: -ratio / math.log(2),
}
"""What makes a score of its ratio: accuracy; perplexity of log-likelihoods; bits of them"""


@dataclass(frozen=True)
class DocumentScores:
    """What each of N documents adds to a model's score."""

    numerators_N: np.ndarray
    """float64: 1 for a right answer, or a log-likelihood"""
    denominators_N: np.ndarray
    """float64: 1 for a document, or its words"""
    link: str = "mean"
    """of `LINKS`"""

    @property
    def score(self) -> float:
        """link(sum of the numerators / sum of the denominators)."""
        ratio = np.asarray(self.numerators_N.sum() / self.denominators_N.sum())
        return float(LINKS[self.link](ratio))


def resampled(models: Sequence[DocumentScores], name: str, seed: int) -> list[np.ndarray]:
    """Scores of models on `NUM_RESAMPLES` draws of their documents, float64 (draws,) for each.

    The same name, seed and number of documents give the same draws in every call, so that models
    that are compared in different calls are paired all the same.

    Args:
        models: on the same documents in the same order.
        name: of the documents; draws of different names are independent.
        seed: of the draws.

    Raises:
        ValueError: models with different numbers of documents.

    Cost: draws x documents random numbers, and a sum over them for each model.
    """
    num_documents = len(models[0].numerators_N)
    if any(len(model.numerators_N) != num_documents for model in models):
        raise ValueError("models were scored on different documents")
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    chunk = max(1, _CHUNK // num_documents)
    found: list[list[np.ndarray]] = [[] for _ in models]
    for start in range(0, NUM_RESAMPLES, chunk):
        size = (min(chunk, NUM_RESAMPLES - start), num_documents)
        drawn_BN = generator.integers(num_documents, size=size)
        for model, parts in zip(models, found, strict=True):
            above_B = model.numerators_N[drawn_BN].sum(axis=1)
            parts.append(LINKS[model.link](above_B / model.denominators_N[drawn_BN].sum(axis=1)))
    return [np.concatenate(parts) for parts in found]


@dataclass(frozen=True)
class Recovery:
    """A model against the dense one, with intervals of 95 %."""

    recovery: float | None
    """share of the dense score; where lower is better, the dense score as a share of this one"""
    recovery_low: float | None
    recovery_high: float | None
    difference: float
    """this score less the dense one"""
    difference_low: float | None
    difference_high: float | None
    is_noise: bool | None
    """whether the interval of the difference holds 0; None without one"""


def compare(
    score: float,
    dense: float,
    draws: tuple[np.ndarray, np.ndarray] | None,
    higher_is_better: bool = True,
) -> Recovery:
    """Recovery and difference of a score against the dense model's.

    Args:
        score: of the model.
        dense: of the dense model.
        draws: scores of the model and of the dense one on the same draws (`resampled`, or what is
            computed of several of them); None where documents have no scores of their own.
        higher_is_better: of the score.

    Returns:
        A recovery is None where the dense score is 0, and its interval where that of a draw is.
    """
    above, below = (score, dense) if higher_is_better else (dense, score)
    recovery = above / below if below > 0 else None
    if draws is None:
        return Recovery(recovery, None, None, score - dense, None, None, None)
    low, high = _interval(draws[0] - draws[1])
    above_B, below_B = draws if higher_is_better else draws[::-1]
    shares: tuple[float | None, float | None] = (None, None)
    if recovery is not None and (below_B > 0).all():
        shares = _interval(above_B / below_B)
    return Recovery(recovery, *shares, score - dense, low, high, low <= 0 <= high)


def _interval(values: np.ndarray) -> tuple[float, float]:
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
