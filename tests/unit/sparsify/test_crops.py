"""Calibration rows from all over a source: where they begin, that none share text, and when not."""

from __future__ import annotations

import random

import pytest
import torch
from test_rows import BEGIN, END, Letters

from sparsify.data import crops
from sparsify.data.crops import crop_rows
from sparsify.errors import InputError

T = 16


class Words:
    """A tokenizer whose tokens are numbered words: 'w12 ' is 12. Cut words would not be numbers."""

    bos_token_id, eos_token_id = None, END

    def __call__(self, texts, verbose):
        return {"input_ids": [[int(word[1:]) for word in text.split()] for text in texts]}


def numbered(num_documents, num_words):
    """Documents of words of five characters, each word another number from 1,000 on."""
    numbers = iter(range(1000, 1000 + num_documents * num_words))
    return [" ".join(f"w{next(numbers)}" for _ in range(num_words)) for _ in range(num_documents)]


def test_rows_come_from_all_over_the_text_and_share_nothing():
    documents = numbered(10, 600)
    rows = crop_rows(documents, Words(), T, 20, seed=3)
    assert rows.ids_NT.shape == (20, T)
    words = rows.ids_NT[rows.ids_NT != END]
    assert len(words.unique()) == len(words)
    # 16 times the text of the rows is more than there is, so every 300 words hold one row.
    assert torch.equal((rows.ids_NT[:, 0] - 1000) // 300, torch.arange(20))
    steps = rows.ids_NT.diff(dim=1)
    inside = (rows.ids_NT[:, 1:] != END) & (rows.ids_NT[:, :-1] != END)
    assert (steps[inside] == 1).all()


def test_long_documents_count_by_their_length():
    documents = numbered(1, 6000) + [text.replace("w", "w9") for text in numbered(40, 50)]
    rows = crop_rows(documents, Words(), T, 32, seed=0)
    from_long = int((rows.ids_NT[:, 0] < 10_000).sum())
    assert from_long == 23  # 36,000 of 50,000 characters


def test_reads_sixteen_times_the_text_of_the_rows_and_no_more():
    read = []

    def documents():
        for text in numbered(1, 400) * 1000:
            read.append(text)
            yield text

    assert len(crop_rows(documents(), Words(), T, 4, seed=0)) == 4
    assert sum(map(len, read[:-1])) < 16 * 8 * T * 4 <= sum(map(len, read))


def test_a_row_goes_on_in_the_next_document_and_says_so():
    documents = [f"w{number} w{number}" for number in range(1000, 1400)]
    rows = crop_rows(documents, Words(), T, 3, seed=1)
    for ids, positions in zip(rows.ids_NT.tolist(), rows.positions_NT.tolist(), strict=True):
        for at in range(1, T):
            is_start = ids[at - 1] == END
            assert positions[at] == (0 if is_start else positions[at - 1] + 1)
    assert END in rows.ids_NT


def test_seed_moves_the_rows_and_nothing_else_does():
    documents = numbered(30, 200)
    first, again, other = (
        crop_rows(documents, Words(), T, 5, seed=seed).ids_NT for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("num_chars", [8 * T * 4 - 1, 8 * T * 4])
def test_too_little_text_gives_none(num_chars):
    text = "".join(random.Random(0).choice("abc ") for _ in range(num_chars))
    found = crop_rows([text], Letters(), T, 4, seed=0)
    assert (found is None) == (num_chars < 8 * T * 4)


def test_words_too_long_for_a_stretch_give_none():
    class Long(Words):
        """Tokens of ten characters."""

        def __call__(self, texts, verbose):
            return {"input_ids": [[1] * (len(text) // 10) for text in texts]}

    assert crop_rows(["x" * (8 * T * 4)], Long(), T, 4, seed=0) is None
    assert len(crop_rows(["x" * (16 * T * 4)], Long(), T, 4, seed=0)) == 4


def test_every_row_begins_as_the_tokenizer_begins_a_text():
    rows = crop_rows(["ab " * 2000], Letters(BEGIN, END, sets_begin=True), T, 4, seed=0)
    assert (rows.ids_NT[:, 0] == BEGIN).all()
    assert (rows.ids_NT[:, 1] == ord("a")).all()


def test_one_token_is_no_row():
    with pytest.raises(InputError, match="at least 2"):
        crop_rows(["abc"], Letters(), 1, 1, seed=0)


def test_of_long_documents_parts_are_taken_from_all_over(monkeypatch):
    monkeypatch.setattr(crops, "_LONG_CHARS", 10_000)
    documents = numbered(6, 10_000)  # 60,000 characters each
    rows = crop_rows(documents, Words(), T, 4, seed=0)  # reads 8,192 characters, 2,048 of each
    found = (rows.ids_NT[:, 0] - 1000) // 2500  # quarters of documents
    assert (found // 4).unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(rows.ids_NT, crop_rows(documents, Words(), T, 4, seed=0).ids_NT)
    one = crop_rows(documents[:1], Words(), T, 4, seed=0)
    assert (one.ids_NT[:, 0] // 2500).unique().numel() > 1, "of one document too"
