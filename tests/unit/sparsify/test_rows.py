"""Token rows: how documents are packed, and where inside its document each token stands."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from sparsify.data import rows as rows_module
from sparsify.data.rows import TokenRows, token_rows
from sparsify.errors import InputError
from tests.conftest import END_OF_TEXT, equal

END = 320
BEGIN = 321


class Letters:
    """A tokenizer whose tokens are the characters of a text."""

    def __init__(self, bos_token_id=None, eos_token_id=END, sets_begin=False):
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self._first = [bos_token_id] if sets_begin else []

    def __call__(self, texts, verbose):
        return {"input_ids": [self._first + [ord(c) for c in text] for text in texts]}


def slow_rows(documents, length):
    """(ids, positions) of whole rows from lists of token ids, token by token."""
    ids, positions = [], []
    for document in documents:
        place = 0
        for token in document:
            place = 0 if len(ids) % length == 0 else place
            ids.append(token)
            positions.append(place)
            place += 1
    num = len(ids) // length * length
    return [torch.tensor(x[:num]).reshape(-1, length) for x in (ids, positions)]


@pytest.mark.parametrize("length", [2, 3, 5, 8, 13])
def test_positions_restart_at_documents_and_rows(length):
    texts = ["abcdefg", "h", "", "ijklmnopqrstuvwxyz", "0123", "456", "789"]
    rows = token_rows(texts, Letters(), length)
    # The end of text belongs to the document before it; an empty text has none.
    documents = [[ord(c) for c in text] + [END] for text in texts if text]
    ids, positions = slow_rows(documents, length)
    assert torch.equal(rows.ids_NT, ids)
    assert torch.equal(rows.positions_NT, positions)
    assert rows.ids_NT.dtype == rows.positions_NT.dtype == torch.int64
    assert (rows.positions_NT[:, 0] == 0).all()
    few = token_rows(texts, Letters(), length, num_rows=2)
    assert torch.equal(few.positions_NT, positions[:2])


def test_beginning_belongs_to_the_document_it_begins():
    rows = token_rows(["abc", "de", "f"], Letters(BEGIN, END, sets_begin=True), 9)
    assert rows.ids_NT.tolist() == [[BEGIN, 97, 98, 99, BEGIN, 100, 101, BEGIN, 102]]
    assert rows.positions_NT.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]


def test_too_little_text_gives_no_rows():
    rows = token_rows(["abc"], Letters(), 8)
    assert rows.ids_NT.shape == rows.positions_NT.shape == (0, 8)
    assert not rows.is_joined
    with pytest.raises(InputError, match="too short"):
        token_rows(["abc"], Letters(), 1)


def test_rows_are_sliced_split_and_joined_together(packed_rows):
    rows = packed_rows
    assert (len(rows), rows.num_tokens) == (12, 384)
    assert rows.is_joined
    order = torch.tensor([3, 1])
    for index in (slice(2, 9, 3), order):
        assert torch.equal(rows[index].ids_NT, rows.ids_NT[index])
        assert torch.equal(rows[index].positions_NT, rows.positions_NT[index])
    parts = rows.split(5)
    assert [len(part) for part in parts] == [5, 5, 2]
    joined = TokenRows.joined(parts)
    assert torch.equal(joined.ids_NT, rows.ids_NT)
    assert torch.equal(joined.positions_NT, rows.positions_NT)
    assert rows.to("cpu").ids_NT.device.type == "cpu"


def test_whole_rows_are_one_document_each(tiny_rows):
    assert torch.equal(tiny_rows.positions_NT, torch.arange(32).repeat(12, 1))
    assert not tiny_rows.is_joined
    with pytest.raises(InputError, match="expected \\(rows, tokens\\)"):
        TokenRows.whole(torch.arange(4))


def test_has_next_says_where_the_next_token_is_of_the_same_document():
    rows = TokenRows(torch.zeros(2, 6), torch.tensor([[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]))
    assert rows.has_next_NT.int().tolist() == [[1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0]]


LONG_TEXTS = {
    "code": Path(rows_module.__file__).read_text(encoding="utf-8"),
    "mixed": "".join(random.Random(0).choice("ab é你 \n\t😀.,;'") for _ in range(5000)),
    "one word": "abc" * 2000,
    "spaces": " " * 3000 + "x",
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
@pytest.mark.parametrize("marks", [False, True])
def test_a_long_text_has_the_tokens_of_the_whole(tiny_tokenizer, monkeypatch, kind, marks):
    tokenizer = tiny_tokenizer
    if marks:  # puts both marks around a text by itself
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, 0)]
        )
    texts = ["the first", LONG_TEXTS[kind], "the last"]
    whole = token_rows(texts, tokenizer, 7)
    for name, value in (("LONG", 500), ("WINDOW", 300), ("OVERLAP", 80)):
        monkeypatch.setattr(rows_module, f"_{name}_CHARS", value)
    rows = token_rows(texts, tokenizer, 7)
    assert equal(rows, whole)


def test_of_a_long_text_as_much_is_tokenised_as_rows_need(tiny_tokenizer, monkeypatch):
    for name, value in (("LONG", 5000), ("WINDOW", 3000), ("OVERLAP", 80)):
        monkeypatch.setattr(rows_module, f"_{name}_CHARS", value)
    seen = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tiny_tokenizer, name)

        def __call__(self, texts, **options):
            seen.extend(texts)
            return tiny_tokenizer(texts, **options)

    assert len(token_rows(["a dog ran. " * 10_000], Counting(), 16, num_rows=4)) == 4
    assert sum(map(len, seen)) == 3000 + 3000
