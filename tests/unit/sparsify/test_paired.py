"""The paired bootstrap against all resamples there are, and against loops."""

from __future__ import annotations

import itertools
import math
import zlib

import numpy as np
import pytest

from sparsify.evaluation import paired
from sparsify.evaluation.paired import NUM_RESAMPLES, DocumentScores, compare, resampled

DENSE = np.array([1.0, 1.0, 0.0, 1.0, 1.0])
SPARSE = np.array([1.0, 0.0, 0.0, 1.0, 1.0])


def scores(values: np.ndarray, sizes: np.ndarray | None = None, link: str = "mean"):
    return DocumentScores(values, np.ones_like(values) if sizes is None else sizes, link)


def test_intervals_are_those_of_all_resamples() -> None:
    """Five documents have 3,125 resamples, each as likely as the other."""
    every = np.array(list(itertools.product(range(5), repeat=5)))
    exact = (SPARSE[every].mean(axis=1) - DENSE[every].mean(axis=1)).round(12)
    drawn = resampled([scores(SPARSE), scores(DENSE)], "task", 0)
    difference = (drawn[0] - drawn[1]).round(12)
    # The error of a share of 10,000 draws is at most 0.005; three times that.
    for value in np.unique(exact):
        share, expected = (difference == value).mean(), (exact == value).mean()
        assert abs(share - expected) < 0.015
    found = compare(0.6, 0.8, (drawn[0], drawn[1]))
    low, high = np.quantile(exact, [0.025, 0.975])
    assert (found.difference_low, found.difference_high) == pytest.approx((low, high))
    assert found.is_noise, "one document of five proves nothing"
    assert found.recovery == pytest.approx(0.75)


def test_draws_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "_CHUNK", 21)  # many chunks, the last one short
    values, sizes = np.array([-3.0, -1.0, -8.0, -2.0]), np.array([2.0, 1.0, 4.0, 3.0])
    drawn = resampled([scores(values, sizes, "exp"), scores(values, sizes, "bits")], "words", 7)
    generator = np.random.default_rng([7, zlib.crc32(b"words")])
    for start in range(0, NUM_RESAMPLES, 5):
        for at, documents in enumerate(generator.integers(4, size=(5, 4)).tolist(), start):
            ratio = sum(values[d] for d in documents) / sum(sizes[d] for d in documents)
            assert drawn[0][at] == pytest.approx(math.exp(-ratio), rel=1e-12)
            assert drawn[1][at] == pytest.approx(-ratio / math.log(2), rel=1e-12)


def test_pairing_takes_out_what_both_models_share() -> None:
    """Documents that both get right or wrong widen neither interval: an unpaired one would be."""
    generator = np.random.default_rng(0)
    dense = (generator.random(400) < 0.5).astype(float)
    sparse = dense.copy()
    sparse[:12] = 0.0
    drawn = resampled([scores(sparse), scores(dense)], "task", 0)
    found = compare(sparse.mean(), dense.mean(), (drawn[0], drawn[1]))
    assert not found.is_noise
    unpaired = resampled([scores(dense)], "other documents", 0)[0]
    assert np.quantile(drawn[0] - unpaired, 0.975) > 0, "unpaired, it would look like noise"


def test_equal_models_recover_everything_and_seeds_decide_the_draws() -> None:
    one, other = resampled([scores(DENSE), scores(DENSE)], "task", 0)
    found = compare(0.8, 0.8, (one, other))
    assert (found.difference_low, found.difference_high, found.is_noise) == (0.0, 0.0, True)
    assert np.array_equal(one, resampled([scores(DENSE)], "task", 0)[0])
    assert not np.array_equal(one, resampled([scores(DENSE)], "task", 1)[0])
    assert not np.array_equal(one, resampled([scores(DENSE)], "another", 0)[0])


def test_lower_is_better_turns_the_recovery_round() -> None:
    found = compare(12.0, 10.0, (np.full(3, 12.0), np.full(3, 10.0)), higher_is_better=False)
    assert found.recovery == found.recovery_low == pytest.approx(10 / 12)
    assert found.difference == 2.0 and not found.is_noise


def test_a_dense_score_of_nothing_has_no_recovery() -> None:
    found = compare(0.1, 0.0, (np.array([0.1, 0.2]), np.array([0.0, 0.0])))
    assert found.recovery is None and found.recovery_low is None
    assert found.difference == 0.1 and found.is_noise is False
    assert compare(0.5, 1.0, None).recovery == 0.5


def test_models_on_different_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="different documents"):
        resampled([scores(DENSE), scores(DENSE[:3])], "task", 0)
