"""The benchmark of the loss: sides that compute the same, memory taken, and the table."""

from __future__ import annotations

import pytest
import torch

from jobs.benchmarks import loss
from jobs.benchmarks.sides import loss as side_loss

SIZE = {
    "tokens": 48, "vocabulary": 97, "width": 16, "chunk": 20, "dtype": "float32", "device": "cpu",
}  # fmt: skip


def test_sides_compute_the_same_loss_and_products_of_its_shapes():
    head, naive, plain = (
        side_loss.build(side, **SIZE)() for side in ("head", "naive", "operations")
    )
    torch.testing.assert_close(head, naive, rtol=1e-5, atol=0)
    assert head == plain, "without a GPU there is no kernel to leave out"
    assert side_loss.difference(**SIZE) == 0
    assert side_loss.build("products", **SIZE)().shape == (97, 16)


def test_summary():
    memory = [
        {"tokens": 10, "vocabulary": 100, "head_bytes": 5000, "naive_bytes": 9000},
        {"tokens": 40, "vocabulary": 100, "head_bytes": 6200, "naive_bytes": 45000},
    ]
    seconds = {"head": 2.2, "products": 2.0, "naive": 3.0}
    found = loss.summarise(seconds, memory, SIZE, num_threads=1)
    assert found.figures["ratio"] == pytest.approx(1.1)
    assert found.figures["growth"] == pytest.approx(0.1)
    assert found.figures["growth_naive"] == pytest.approx(3.0)
    assert [target.is_met for target in found.targets] == [True, False]
    assert found.tables[0].rows[0] == ("loss", "2.200 s", "1.100")


def test_a_kernel_has_to_be_right_and_no_slower():
    memory = [{"tokens": n, "vocabulary": 9, "head_bytes": 0, "naive_bytes": 0} for n in (1, 4)]
    seconds = {"head": 2.0, "products": 1.9, "naive": 9.0, "operations": 3.0}
    found = loss.summarise(seconds, memory, SIZE, 1, apart=0.01)
    assert found.figures["ratio_to_operations"] == 1.5
    assert [target.is_met for target in found.targets] == [True, True, False, True]
    assert ("loss without its kernel", "3.000 s", "1.579") in found.tables[0].rows
