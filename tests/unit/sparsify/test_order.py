"""The training order: bijections, exact shares, any world size, and values that must not change."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from sparsify.data.order import BLOCK_SLOTS, TrainingOrder, key_of, largest_remainder, permuted
from sparsify.errors import InputError

SIZES = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    97,
    101,
    127,
    128,
    129,
    143,
    144,
    145,
    1009,
    4096,
    4097,
]


ORDER_OF_TEN = [[5, 1, 3, 0, 7, 6, 9, 8, 2, 4], [6, 3, 2, 5, 4, 0, 7, 9, 1, 8]]
MIX_SOURCES = [1, 0, 0, 1, 2, 1, 0, 0, 1, 0, 0, 1]
MIX_ROWS = [431, 622, 440, 365, 0, 459, 52, 787, 212, 320, 597, 319]
MIX_LATE = [1241, 585, 261, 1230, 1505, 442, 1133, 473]
LARGE = [1385842, 203991, 52760, 627834]


def keys(*seeds: int) -> np.ndarray:
    return np.array([key_of(seed) for seed in seeds], dtype=np.uint64)


def slow_permuted(index: int, num_items: int, key: int) -> int:
    """The definition with Python's own integers: rounds, halves, cycle walking."""
    word, golden = 2**64, 0x9E3779B97F4A7C15

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % word
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % word
        return x ^ (x >> 31)

    a = next(a for a in range(1, num_items + 1) if a * a >= num_items)
    b = next(b for b in range(1, num_items + 1) if a * b >= num_items)
    while True:
        left, right = divmod(index, b)
        for r in range(16):
            round_key = mixed((key + (r + 1) * golden) % word)
            if r % 2 == 0:
                left = (left + mixed(right ^ round_key) % a) % a
            else:
                right = (right + mixed(left ^ round_key) % b) % b
        index = left * b + right
        if index < num_items:
            return index


@pytest.mark.parametrize("num_items", SIZES)
def test_a_permutation_has_every_index_once(num_items: int) -> None:
    for seed in range(3):
        found = permuted(np.arange(num_items), num_items, keys(seed))
        assert sorted(found.tolist()) == list(range(num_items))


@pytest.mark.parametrize("num_items", [1, 2, 3, 10, 97, 128, 1001])
def test_a_permutation_is_that_of_the_definition(num_items: int) -> None:
    key = key_of("some", num_items)
    found = permuted(np.arange(num_items), num_items, np.array([key], dtype=np.uint64))
    assert found.tolist() == [slow_permuted(i, num_items, key) for i in range(num_items)]


def test_each_index_can_have_a_key_of_its_own() -> None:
    index, key = np.arange(101), keys(*range(101))
    one_by_one = [int(permuted(index[i : i + 1], 101, key[i : i + 1])[0]) for i in range(101)]
    assert permuted(index, 101, key).tolist() == one_by_one


def test_a_large_set_needs_no_list() -> None:
    num_items = 2**40 + 7
    found = permuted(np.arange(1000) * 2**30, num_items, keys(0))
    assert len(set(found.tolist())) == 1000
    assert 0 <= found.min() <= found.max() < num_items


def test_every_place_is_equally_likely_over_the_keys() -> None:
    """Chi-square of (index, place) over 20,000 keys; 16 degrees of freedom, so 16 +- 5.7."""
    key = np.arange(20_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    counts = np.stack(
        [np.bincount(permuted(np.full(20_000, i), 5, key), minlength=5) for i in range(5)]
    )
    assert ((counts - 4000.0) ** 2 / 4000).sum() < 45  # p < 0.0002 by chance; the seed is fixed


def test_golden_values() -> None:
    """A resumed run must find the order it started with: these never change."""
    assert TrainingOrder([10], seed=0).rows(range(20)).tolist() == [
        *ORDER_OF_TEN[0], *ORDER_OF_TEN[1],
    ]  # fmt: skip
    mix = TrainingOrder([1000, 500, 7], [0.5, 0.4, 0.1], seed=1)
    places = mix.places(range(12))
    assert places.source_N.tolist() == MIX_SOURCES
    assert places.row_N.tolist() == MIX_ROWS
    assert mix.batch(8265, 8).tolist() == MIX_LATE
    assert TrainingOrder([1_600_000], seed=2**63 - 1).batch(10**6, 4).tolist() == LARGE


@pytest.mark.parametrize("num_rows", [1, 2, 5, 64, 97])
def test_no_row_comes_again_before_all_have_come(num_rows: int) -> None:
    order = TrainingOrder([num_rows], seed=3)
    places = order.places(range(4 * num_rows))
    for epoch in range(4):
        part = slice(epoch * num_rows, (epoch + 1) * num_rows)
        assert (places.epoch_N[part] == epoch).all()
        assert sorted(places.row_N[part].tolist()) == list(range(num_rows))
    if num_rows > 5:
        assert places.row_N[:num_rows].tolist() != places.row_N[num_rows : 2 * num_rows].tolist()


def test_no_row_of_a_mix_comes_again_before_all_of_its_source_have_come() -> None:
    order = TrainingOrder([700, 90, 1], [0.6, 0.39, 0.01], seed=5)
    places = order.places(range(3 * BLOCK_SLOTS + 17))
    for source, num_rows in enumerate(order.num_rows):
        rows = places.row_N[places.source_N == source].tolist()
        epochs = places.epoch_N[places.source_N == source].tolist()
        assert epochs == [i // num_rows for i in range(len(rows))]
        for start in range(0, len(rows) - num_rows + 1, num_rows):
            assert sorted(rows[start : start + num_rows]) == list(range(num_rows))


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [0.123, 0.456, 0.421], [998, 1, 1]])
def test_shares_are_exact_in_every_block_and_even_inside(weights: list[float]) -> None:
    order = TrainingOrder([1000] * len(weights), weights, seed=7)
    assert sum(order.block_counts) == BLOCK_SLOTS
    for count, weight in zip(order.block_counts, weights, strict=True):
        share = Fraction(weight) / sum(map(Fraction, weights))
        assert abs(Fraction(count, BLOCK_SLOTS) - share) < Fraction(1, BLOCK_SLOTS)
    sources = order.places(range(5 * BLOCK_SLOTS)).source_N.reshape(5, BLOCK_SLOTS)
    for block in sources:
        assert torch.bincount(block, minlength=len(weights)).tolist() == list(order.block_counts)
    part = torch.arange(1, BLOCK_SLOTS + 1)
    for source, count in enumerate(order.block_counts):
        seen = (sources == source).cumsum(1)
        assert ((seen - part * count / BLOCK_SLOTS).abs() <= 1 + len(weights)).all()
    assert not torch.equal(sources[0], sources[1])


def test_a_batch_is_the_rows_of_its_slots() -> None:
    order = TrainingOrder([300, 200], [0.5, 0.5], seed=11)
    for step in (0, 1, 83, 1000):  # 83: a batch over the border of two blocks
        found = order.batch(step, 12).tolist()
        assert found == [int(order.rows([slot])) for slot in range(12 * step, 12 * step + 12)]


def test_slots_can_be_asked_for_in_any_order_and_by_anybody() -> None:
    def make() -> TrainingOrder:
        return TrainingOrder([300, 200, 40], [0.5, 0.3, 0.2], seed=2)

    expected = make().rows(range(20_000))
    slots = torch.randperm(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make().rows(slots), expected[slots])
    order = make()
    one_by_one = [int(order.rows([slot])[0]) for slot in slots[:200].tolist()]
    assert one_by_one == expected[slots[:200]].tolist()


def test_the_seed_decides() -> None:
    first, again, other = (TrainingOrder([500], seed=seed).batch(0, 64) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sources_of_equal_size_have_orders_of_their_own() -> None:
    places = TrainingOrder([100, 100], [1, 1], seed=0).places(range(200))
    first, second = (places.row_N[places.source_N == source].tolist() for source in (0, 1))
    assert first != second


def test_largest_remainder() -> None:
    assert largest_remainder([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert largest_remainder([1 / 3, 1 / 3, 1 / 3], 10) == [4, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (([],), "0 sources"),
        (([1, 2], [1.0]), "1 weights for 2 sources"),
        (([3, 0], [1.0, 1.0]), "source 1 has 0 rows"),
        (([3, 3], [1.0, -1.0]), "weight over 0"),
        (([3, 3], [1.0, float("nan")]), "weight over 0"),
        (([3, 3], [1.0, 1e-4]), "less than one row in 1000"),
    ],
)
def test_wrong_sources_are_refused(arguments: tuple, part: str) -> None:
    with pytest.raises(InputError, match=part):
        TrainingOrder(*arguments)


def test_wrong_slots_are_refused() -> None:
    order = TrainingOrder([10])
    with pytest.raises(InputError, match="slot -1"):
        order.rows([3, -1])
