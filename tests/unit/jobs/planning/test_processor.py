"""What the processor reaches: counted operations over the seconds that the clock says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from jobs.planning import processor


@pytest.fixture
def half_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes half a second."""
    clock: Iterator[float] = itertools.count(0.0, 0.5)
    monkeypatch.setattr(processor.time, "process_time", lambda: next(clock))


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_work_over_time(element_bytes: int, half_seconds: None) -> None:
    threads = torch.get_num_threads()
    found = processor.measure_rates(element_bytes)
    assert found.products == found.float32 == 3 * 2 * 256 * 1024 * 2048 / 0.5
    # Two products of 64 by 256 by 256 a head, half of them masked; backward takes 2.5 of them.
    assert found.attention == 3.5 * 2 * (2 * 256 * 256 * 64) / 2 * 16 / 0.5
    assert found.bandwidth == 3 * 4 * 2**21 / 0.5
    assert not found.overlaps and torch.get_num_threads() == threads


def test_the_fastest_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 3.0, 5.0, 6.0, 7.0, 9.0])
    monkeypatch.setattr(processor.time, "process_time", lambda: next(times))
    assert processor._fastest_s(lambda: None) == 1.0


def test_a_process_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    processor.processor_rates.cache_clear()
    first = processor.processor_rates(4)
    monkeypatch.setattr(processor, "measure_rates", lambda _: pytest.fail("measured again"))
    assert processor.processor_rates(4) is first
