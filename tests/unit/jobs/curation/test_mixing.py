"""Shares of several sources: what is taken, what happens when one runs out, and by which seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.curation.mixing import mix, take
from sparsify.errors import InputError
from tests.conftest import message


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.int64)


def amounts(sizes, shares, total=None, when_short="shrink", seed=0) -> list[int]:
    names = [f"s{i}" for i in range(len(sizes))]
    return [one.taken for one in mix(names, shares, sizes, total, when_short, seed)]


def test_the_shortest_source_sets_the_size() -> None:
    assert amounts([ones(100), ones(900)], [0.5, 0.5]) == [100, 100]
    assert amounts([ones(100), ones(900)], [0.25, 0.75]) == [100, 300]


def test_repeat_uses_all_of_each() -> None:
    first, second = mix(["a", "b"], [0.5, 0.5], [ones(40), ones(100)], None, "repeat", 0)
    assert (first.taken, second.taken) == (100, 100)
    assert sorted(set(first.counts_N.tolist())) == [2, 3]
    assert first.counts_N.sum() == 100
    assert set(second.counts_N.tolist()) == {1}


def test_a_total_is_kept_shrunk_or_refused() -> None:
    sizes = [ones(100), ones(900)]
    assert amounts(sizes, [0.5, 0.5], 50) == [25, 25]
    assert amounts(sizes, [0.5, 0.5], 400, "shrink") == [100, 100]
    assert amounts(sizes, [0.5, 0.5], 400, "repeat") == [200, 200]
    with pytest.raises(InputError) as error:
        amounts(sizes, [0.5, 0.5], 400, "error")
    assert "s0 has 100 and its share 0.5 asks for 200; at most 200 can be had" in message(error)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(InputError) as error:
        amounts([ones(5), ones(0)], [0.5, 0.5])
    assert "nothing is left of s1" in message(error)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=60), min_size=1, max_size=4),
    st.integers(0, 1000), st.integers(1, 500),
)  # fmt: skip
def test_amounts_are_within_half_a_document(sources, seed: int, total: int) -> None:
    sizes = [np.array(source, np.int64) for source in sources]
    shares = [1 / len(sizes)] * len(sizes)
    names = [str(i) for i in range(len(sizes))]
    for one, own in zip(mix(names, shares, sizes, total, "repeat", seed), sizes, strict=True):
        assert abs(one.taken - total / len(sizes)) <= own.max() / 2 + 1e-6
        assert np.ptp(one.counts_N) <= 1  # no document comes again before all have come


def test_a_smaller_take_is_a_part_of_a_larger_one() -> None:
    (small,), (large,), (other,) = (
        take([share], [ones(1000)], seed) for share, seed in ((0.1, 0), (0.3, 0), (0.1, 1))
    )
    assert small.taken == 100
    assert (small.counts_N <= large.counts_N).all()
    assert not np.array_equal(small.counts_N, other.counts_N)
    picked = np.flatnonzero(small.counts_N)
    assert abs(picked.mean() - 499.5) < 4 * 289 / np.sqrt(100)  # from everywhere alike
