"""The text of one record, whatever format it came in, and the errors of records without one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.corpus.documents import EMPTY, HALVES, Documents, Remarks
from sparsify.errors import InputError

_HALF = re.compile("[\ud800-\udfff]")  # strings hold pairs joined, so that what is left is halves


def field_of(record: Any, text_field: str, place: str) -> str | None:
    """The text of a record, as it is; None where it is null.

    Raises:
        InputError: no record, no such field, or something else than text in it.
    """
    if not isinstance(record, dict):
        raise InputError(f"{place}: a {type(record).__name__}, not an object with fields")
    if text_field not in record:
        raise no_field(place, text_field, list(record))
    value = record[text_field]
    if value is not None and not isinstance(value, str):
        raise not_text(place, text_field, type(value).__name__)
    return value


def no_field(place: str, text_field: str, fields: Sequence[str]) -> InputError:
    """The error of a record or table without the field."""
    return InputError(
        f"{place}: no field {text_field!r}; the fields are {', '.join(fields) or 'none'}; set "
        "data.text_field"
    )


def not_text(place: str, text_field: str, kind: str) -> InputError:
    """The error of a field that holds something else."""
    return InputError(
        f"{place}: field {text_field!r} is {kind}, not a string; set data.text_field to the field "
        "with the text"
    )


def has_halves(text: str) -> bool:
    """Whether there is half of a surrogate pair in it, which no tokenizer takes."""
    return not text.isascii() and _HALF.search(text) is not None


def whole_characters(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, as UTF-8 decoders have it."""
    return _HALF.sub("\ufffd", text) if has_halves(text) else text


def record_documents(
    path: Path, unit: str, records: Sequence[Any], text_field: str, numbers: Sequence[int]
) -> Documents:
    """The texts of a file's records, which are in memory; `unit` is what their numbers count."""
    remarks = Remarks()
    texts: list[str] = []
    for number, record in zip(numbers, records, strict=True):
        text = field_of(record, text_field, f"data source {path}, {unit} {number}")
        if not text:
            remarks.add(EMPTY, f"{path.name}, {unit} {number}")
            continue
        if has_halves(text):
            remarks.add(HALVES, f"{path.name}, {unit} {number}")
        texts.append(whole_characters(text))
    return Documents(texts, str, remarks)
