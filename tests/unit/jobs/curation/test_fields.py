"""The text of records in the shapes that data sets come in."""

from __future__ import annotations

import pytest

from jobs.curation.fields import all_strings, record_text
from sparsify.errors import InputError
from tests.conftest import message

PARTS = [{"type": "text", "text": "hi"}, {"type": "image", "url": None}]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"id": 1, "text": "hi"}, "hi"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "a", "content": "ho"}]},
         "hi\n\nho"),
        ({"messages": [{"role": "user", "content": PARTS}]}, "hi"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "hi"),
        ({"conversations": ["hi", "ho"], "source": "lima"}, "hi\n\nho"),
        ({"prompt": "hi", "completion": "ho"}, "hi\n\nho"),
        ({"prompt": [{"role": "user", "content": "hi"}],
          "completion": [{"role": "assistant", "content": "ho"}]}, "hi\n\nho"),
        ({"output": "ho", "input": "", "instruction": "hi"}, "hi\n\nho"),
        ({"instruction": "hi", "context": "in", "response": "ho"}, "hi\n\nin\n\nho"),
        ({"question": "1+1", "answer": "2"}, "1+1\n\n2"),
        ({"text": None}, ""),
    ],
)  # fmt: skip
def test_shapes(record, text: str) -> None:
    assert record_text(record, [], "here") == text


@pytest.mark.parametrize(
    ("record", "fields", "words"),
    [
        ({"txt": "hi"}, [], "no field that is known to hold text"),
        ({"text": "hi"}, ["txt"], "no field 'txt'; the fields are text"),
        ({"text": 7}, [], "field 'text' is int"),
    ],
)
def test_records_without_text(record, fields, words: str) -> None:
    with pytest.raises(InputError) as error:
        record_text(record, fields, "data source a.jsonl, line 3")
    assert message(error).startswith("data source a.jsonl, line 3: ")
    assert words in message(error)


def test_all_strings() -> None:
    assert list(all_strings({"a": ["x", {"b": "y"}], "c": 1})) == ["x", "y"]
