"""MinHash against exact Jaccard similarity, and copies against brute force."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.curation.copies import exact_firsts, near_firsts
from jobs.curation.grams import gram_hashes, shingles
from jobs.curation.minhash import RECALL, MinHash, bands, estimate, jaccard
from jobs.curation.text import Text

WORDS = [f"w{i}" for i in range(400)]


def sets_of(common: int, first: int, second: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of 64-bit words that have `common` of them in common."""
    generator = np.random.default_rng(seed)
    words = np.unique(generator.integers(0, 2**63, 2 * (common + first + second), np.uint64))
    generator.shuffle(words)
    shared = words[:common]
    own = words[common : common + first], words[common + first : common + first + second]
    return np.sort(np.concatenate([shared, own[0]])), np.sort(np.concatenate([shared, own[1]]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 400), st.integers(0, 10**6))
def test_an_estimate_is_within_five_deviations(common, first, second, seed) -> None:
    one, other = sets_of(common, first, second, seed)
    true = jaccard(one, other)
    assert true == common / (common + first + second)
    hashing = MinHash(512, 0.8, seed)
    found = estimate(hashing.signature(one), hashing.signature(other))
    # 5 sigma of a binomial with 512 draws, and half a draw: 1 in 1.7 million would be outside.
    assert abs(found - true) <= 5 * math.sqrt(true * (1 - true) / 512) + 0.5 / 512


def test_the_estimate_has_no_bias_and_the_variance_of_the_paper() -> None:
    """Affine maps mod 2^64 are not min-wise independent; what that costs is measured here."""
    for common, own in ((300, 50), (100, 100), (30, 170)):
        errors = []
        for seed in range(200):
            one, other = sets_of(common, own, own, seed)
            hashing = MinHash(128, 0.8, seed)
            true = common / (common + 2 * own)
            errors.append(
                estimate(hashing.signature(one), hashing.signature(other)) - true
            )  # fmt: skip
        sigma = math.sqrt(true * (1 - true) / 128)
        assert abs(np.mean(errors)) < 4 * sigma / math.sqrt(200)
        assert 0.8 < np.std(errors) / sigma < 1.2  # 4 standard errors of 200 draws


def test_a_signature_knows_neither_order_nor_blocks() -> None:
    one, _ = sets_of(10_000, 1, 1, 3)
    hashing = MinHash(64, 0.8, 0)
    shuffled = np.random.default_rng(0).permutation(one)
    by_hand = (one[:, None] * hashing._factors_K + hashing._offsets_K).min(0) >> np.uint64(32)
    assert (hashing.signature(one) == by_hand).all()
    assert (hashing.signature(shuffled) == hashing.signature(one)).all()
    assert (MinHash(64, 0.8, 1).signature(one) != hashing.signature(one)).all()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    num_bands, num_rows = bands(128, threshold)
    assert num_bands * num_rows <= 128
    assert 1 - (1 - threshold**num_rows) ** num_bands >= RECALL
    more = num_rows + 1
    assert 1 - (1 - threshold**more) ** (128 // more) < RECALL


def test_grams_are_of_words_in_a_row() -> None:
    text = Text("The cat -- sat, on THE mat.")
    assert text.plain_words == ["the", "cat", "sat", "on", "the", "mat"]
    assert len(gram_hashes(text.hashes_W, 5)) == 2
    assert len(gram_hashes(text.hashes_W, 7)) == 0
    assert (gram_hashes(text.hashes_W, 1)[0] == gram_hashes(text.hashes_W, 1)[4]).all()
    ab, ba = (gram_hashes(Text(t).hashes_W, 2) for t in ("a b", "b a"))
    assert ab != ba
    assert len(shingles(Text("a b"))) == len(shingles(Text("..."))) == 1
    assert shingles(Text("...")) != shingles(Text("!!!"))
    assert Text("日本語 です").plain_words == ["日", "本", "語", "で", "す"]


def corpus(seed: int, count: int = 40) -> list[str]:
    """Documents of which some are changed copies of others."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 80))) for _ in range(count)]
    for _ in range(count):
        words = rng.choice(texts).split()
        for at in rng.sample(range(len(words)), min(len(words), rng.randint(0, 2))):
            words[at] = rng.choice(WORDS)
        texts.append(" ".join(words))
    rng.shuffle(texts)
    return texts


def brute_force(sets: list[np.ndarray], threshold: float) -> list[int]:
    """For each the first of the connected part of the graph of all pairs."""
    firsts = list(range(len(sets)))
    for b in range(len(sets)):
        for a in range(b):
            if jaccard(sets[a], sets[b]) >= threshold and firsts[a] != firsts[b]:
                low, high = sorted((firsts[a], firsts[b]))
                firsts = [low if one == high else one for one in firsts]
    return firsts


def near(sets: list[np.ndarray], threshold: float, hashing: MinHash) -> list[int]:
    keys = np.stack([hashing.band_keys(hashing.signature(one)) for one in sets], 1)
    alive = np.arange(len(sets))
    return near_firsts(keys, alive, lambda a, b: jaccard(sets[a], sets[b]), threshold).tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.8]))
def test_clusters_are_those_of_all_pairs(seed: int, threshold: float) -> None:
    """With as many bands as find every pair of this size but one in thousands."""
    sets = [shingles(Text(text)) for text in corpus(seed)]
    hashing = MinHash(512, threshold / 2, seed)
    assert near(sets, threshold, hashing) == brute_force(sets, threshold)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_clusters_do_not_depend_on_the_order(seed: int) -> None:
    sets = [shingles(Text(text)) for text in corpus(seed)]
    order = random.Random(seed + 1).sample(range(len(sets)), len(sets))
    hashing = MinHash(128, 0.8, 0)

    def parts(firsts: list[int], names: list[int]) -> set[frozenset[int]]:
        groups: dict[int, set[int]] = {}
        for at, first in enumerate(firsts):
            groups.setdefault(first, set()).add(names[at])
        return {frozenset(group) for group in groups.values()}

    straight = parts(near(sets, 0.8, hashing), list(range(len(sets))))
    assert straight == parts(near([sets[i] for i in order], 0.8, hashing), order)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_the_first_of_equal_digests_stays(values: list[int]) -> None:
    digests = np.array([(v, 7) for v in values], np.uint64).reshape(-1, 2)
    assert exact_firsts(digests).tolist() == [values.index(v) for v in values]
