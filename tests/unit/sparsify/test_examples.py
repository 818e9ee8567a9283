"""Examples packed whole into rows, and what of them is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsify.data.examples import Example, pack
from sparsify.data.rows import TokenRows
from sparsify.data.store import TokenStore
from sparsify.data.store_write import write_rows
from sparsify.distillation import TokenCounts
from sparsify.distillation.loss import square_head
from sparsify.errors import InputError
from tests.conftest import message

LENGTH, FILLER = 16, 0


def example(number: int, size: int, num_answers: int) -> Example:
    ids = np.full(size, number, dtype=np.int64)
    return Example(ids, np.arange(size) >= size - num_answers)


@pytest.fixture
def examples() -> list[Example]:
    generator = np.random.default_rng(0)
    sizes = generator.integers(2, LENGTH + 1, 40)
    return [example(i + 1, int(n), int(generator.integers(1, n))) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("together", [True, False])
def test_every_example_is_whole_once_and_apart(examples: list[Example], together: bool) -> None:
    rows = pack(examples, LENGTH, FILLER, together)
    total = sum(len(one.ids_T) for one in examples)
    assert len(rows) >= -(-total // LENGTH)
    assert len(rows) <= 1.3 * total / LENGTH if together else len(rows) == len(examples)
    found = {}
    for ids_T, positions_T, is_answer_T in zip(
        rows.ids_NT, rows.positions_NT, rows.is_answer_NT, strict=True
    ):
        for number in ids_T.unique().tolist():
            at = ids_T == number
            assert positions_T[at].tolist() == list(range(int(at.sum()))), "a document of its own"
            if number != FILLER:
                assert number not in found
                found[number] = at.sum(), is_answer_T[at]
            else:
                assert not is_answer_T[at].any()
    assert len(found) == len(examples)
    for number, (size, marks) in found.items():
        assert size == len(examples[number - 1].ids_T)
        assert int(marks.sum()) == examples[number - 1].num_answers
    assert TokenCounts.of(rows).ce == sum(one.num_answers for one in examples)
    assert torch.equal(rows.is_used_NT, rows.ids_NT != FILLER)


def test_the_same_examples_give_the_same_rows_and_a_store_keeps_them(
    examples: list[Example], tmp_path: Path, tiny_tokenizer
) -> None:
    rows = pack(examples, LENGTH, FILLER)
    again = pack(examples, LENGTH, FILLER)
    assert torch.equal(rows.ids_NT, again.ids_NT)
    for name, kept in (("marked", rows), ("plain", TokenRows(rows.ids_NT, rows.positions_NT))):
        write_rows(tmp_path / name, {"train": kept}, tiny_tokenizer, LENGTH)
        store = TokenStore.open(tmp_path / name)
        order = torch.arange(len(store)).flip(0)
        read, expected = store.rows(order), kept[order]
        assert torch.equal(read.ids_NT, expected.ids_NT)
        assert torch.equal(read.positions_NT, expected.positions_NT)
        assert torch.equal(read.has_next_NT, expected.has_next_NT)
        assert (read.is_answer_NT is None) == (name == "plain")
    assert TokenStore.open(tmp_path / "marked").digest != TokenStore.open(tmp_path / "plain").digest


def test_losses_count_answers_alone() -> None:
    rows = pack([example(1, 6, 2), example(2, 4, 3)], LENGTH, FILLER)
    assert rows.has_next_NT.nonzero()[:, 1].tolist() == [3, 4, 6, 7, 8]
    assert torch.equal(rows.is_taught_NT, rows.has_next_NT)
    states = [torch.randn(1, LENGTH, 8) for _ in range(3)]
    other = [h + torch.randn_like(h) for h in states]
    loss = square_head(states, other, rows.is_used_NT)
    cut = square_head([h[:, :10] for h in states], [h[:, :10] for h in other])
    torch.testing.assert_close(loss, cut)
    assert not torch.isclose(loss, square_head(states, other))


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(InputError) as error:
        pack([], LENGTH, FILLER)
    assert "no examples" in message(error)
