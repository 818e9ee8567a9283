"""Documents out of files, folders and datasets, read as late as their format allows.

Owns file formats. Knows nothing of splits, tokens or configuration: a source gives a sequence of
strings, in an order that depends on its content alone, or an InputError that names the place.
Plain text and JSON lines are found in the file first and read one by one; other formats are held
whole, and so is what is compressed.

Parquet and Arrow are read by pyarrow, data sets by `datasets`. JSON and CSV are read here:
`datasets` turns texts that look like dates, numbers or missing values ("2020-01-01", "007", "NA")
into such, names no line in its errors, and takes 1.5 to 5 times as long for it, or a copy of the
file on the disk.
"""

from __future__ import annotations

import csv
import io
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.corpus.content import Content
from jobs.corpus.documents import EMPTY, HALVES, LONG, Documents, Remarks, joined
from jobs.corpus.places import (
    FORMATS,
    HUB,
    TEXT_SUFFIXES,
    existing_path,
    full_name,
    is_saved_dataset,
    kind_of,
    source_files,
    split_suffix,
)
from jobs.corpus.records import field_of, has_halves, no_field, record_documents, whole_characters
from jobs.corpus.tables import arrow_documents, dataset_documents, parquet_documents
from sparsify.errors import InputError

PIECE_BYTES = 16 << 20
"""of a document of plain text of twice as much or more, which is read in pieces"""

_EDGE_BYTES = 1 << 16  # in which a piece ends with a line, else with a word

_SOME_BYTES = 4096


def read_source(name: str, text_field: str, separator: str, known: Sequence[str]) -> Documents:
    """The documents of a file, a folder or a dataset.

    Args:
        name: a file (plain text, .jsonl, .json, .csv, .parquet, .arrow), a folder of such files
            (see `source_files`), a folder that `datasets` saved (`FOLDER` or `FOLDER@SPLIT`), or a
            data set of the Hub, `hf:NAME[:CONFIG][@SPLIT]`.
        text_field: field of records that holds the text.
        separator: a line of plain text that ends a document.
        known: other names to suggest when there is no such file.

    Returns:
        Them, without rows whose text is null or empty, and with remarks on what is left out.

    Raises:
        InputError: the source is missing, empty, unreadable, or lacks the field.
    """
    name = full_name(name, known)
    if name.startswith(HUB) or is_dataset(name):
        documents = dataset_documents(name, text_field)
    else:
        path, remarks = existing_path(name, known), Remarks()
        files = source_files(path, remarks)
        parts = [read_file(file, text_field, separator) for file in files]
        documents = parts[0] if path.is_file() else joined(parts)
        remarks.update(documents.remarks)
        documents.remarks = remarks
    if not documents:
        why = "".join(f"; {line}" for line in documents.remarks.lines())
        raise InputError(f"data source {name}: no text in it{why}; give a source that has some")
    return documents


def is_dataset(name: str) -> bool:
    """Whether a source (not `hf:`) is a folder that `datasets` saved, with or without @SPLIT."""
    return is_saved_dataset(split_suffix(name)[0])


def read_file(path: Path, text_field: str, separator: str) -> Documents:
    """The documents of one file."""
    kind, compression = kind_of(path)
    if kind is None:
        raise InputError(f"data source {path}: format not known; expected {FORMATS}")
    if kind == ".parquet":
        return parquet_documents(path, text_field)
    if kind == ".arrow":
        return arrow_documents(path, text_field)
    content = Content.of_file(path, compression)
    documents: Documents
    if kind in TEXT_SUFFIXES:
        documents = (
            plain_text(content, separator)
            if is_line(separator)
            else Documents(_split(content.text(content.begin, content.size), separator))
        )
    elif kind == ".jsonl" or (kind == ".json" and _is_of_lines(content)):
        documents = json_lines(content, text_field)
    else:
        text = content.text(content.begin, content.size)
        read = _json_documents if kind == ".json" else _csv_documents
        documents = read(path, text, text_field)
    documents.remarks.update(content.remarks)
    return documents


# --- plain text ------------------------------------------------------------------------------


def is_line(separator: str) -> bool:
    """Whether a separator is found line by line."""
    return separator == separator.strip(" \t") and "\n" not in separator


class PlainText(Documents):
    """The documents of a plain text, by where they lie in it."""

    def __init__(self, content: Content, is_split: bool | None) -> None:
        super().__init__(range(0), self._text)
        self.content = content
        self.is_split = bool(is_split)
        """whether there is a separator, so that line ends beside it are no part of a document"""
        self.spans = array("q")
        """begin and end of each document, one after another, in bytes"""
        self.marks: list[int] = []
        """where the separator before it begins; of a document's later pieces, the piece itself"""

    def add(self, mark: int, begin: int, end: int) -> None:
        """Enter a document, of 32 MiB or more in pieces; nothing where it is blank."""
        if end - begin >= 2 * PIECE_BYTES:
            size = f"{(end - begin) / 2**20:,.0f} MiB"
            self.remarks.add(LONG, f"{self.content.path.name}, {size}")
        while end - begin >= 2 * PIECE_BYTES:
            cut = _piece_end(self.content, begin + PIECE_BYTES)
            self._enter(mark, begin, cut)
            mark = begin = cut
        if not _is_blank(self.content, begin, end):
            self._enter(mark, begin, end)

    def _enter(self, mark: int, begin: int, end: int) -> None:
        self.marks.append(mark)
        self.spans.extend((begin, end))
        self._items = range(len(self.marks))

    def _text(self, index: int) -> str:
        text = self.content.text(self.spans[2 * index], self.spans[2 * index + 1])
        return text.strip("\n") if self.is_split else text


def plain_text(content: Content, separator: str, is_split: bool | None = None) -> PlainText:
    """Documents between separator lines; a text without such a line is one document as it is.

    Args:
        content: the text, or whole documents of it.
        separator: see `is_line`.
        is_split: of a part of a text, whether there is a separator anywhere in the text.
    """
    documents = PlainText(content, is_split)
    mark, begin = 0, content.begin
    for line_begin, line_end in separator_lines(content, separator.encode()):
        documents.add(mark, begin, line_begin)
        documents.is_split = is_split is not False
        mark, begin = line_begin, line_end
    documents.add(mark, begin, content.size)
    return documents


def _split(text: str, separator: str) -> list[str]:
    parts = re.split(rf"^[ \t]*{re.escape(separator)}[ \t]*$", text, flags=re.MULTILINE)
    if len(parts) > 1:
        parts = [part.strip("\n") for part in parts]
    return [part for part in parts if part.strip()]


def separator_lines(content: Content, separator: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end, that of the line's break, of every line that is the separator alone."""
    for at in content.find(separator):
        if (line := _line_around(content, at, at + len(separator))) is not None:
            yield line


def _line_around(content: Content, begin: int, end: int) -> tuple[int, int] | None:
    """The line of which bytes `begin` to `end` are all but spaces; None if there is more on it."""
    reach = 64
    while True:
        first, last = max(content.begin, begin - reach), min(content.size, end + reach)
        before = content.read(first, begin).rstrip(b" \t")
        behind = content.read(end, last).lstrip(b" \t")
        is_cut = (not before and first > content.begin) or (len(behind) < 2 and last < content.size)
        if not is_cut:
            break
        reach *= 16
    num_end = 2 if behind.startswith(b"\r\n") else int(behind.startswith(b"\n"))
    if (before and not before.endswith(b"\n")) or (behind and not num_end):
        return None
    return first + len(before), last - len(behind) + num_end


def _piece_end(content: Content, least: int) -> int:
    """The first place from `least` on behind a line, else behind a word, else a character."""
    near = content.read(least, least + _EDGE_BYTES)
    for edge in (b"\n", b" "):
        if (at := near.find(edge)) >= 0:
            return least + at + 1
    return least + next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), 0)


def _is_blank(content: Content, begin: int, end: int) -> bool:
    for first in range(begin, end, _SOME_BYTES):
        if some := content.read(first, min(end, first + _SOME_BYTES)).strip():
            # What more is space than ASCII knows is rare, so that the rest is seldom looked at.
            is_clear = 0x20 < some[0] < 0x80
            return not is_clear and not content.text(begin, end).strip()
    return True


# --- records ---------------------------------------------------------------------------------


def json_lines(content: Content, text_field: str, after: str = "") -> Documents:
    """The documents of JSON lines; `after` says where in the file counting lines began."""
    remarks, lines = Remarks(), array("q")
    for number, (begin, line) in enumerate(content.lines(), 1):
        if not line.strip():
            continue
        # No other line can hold a text that is null, empty or half of a surrogate pair.
        if b"null" in line or b'""' in line or b"\\ud" in line or b"\\uD" in line:
            text = _text_or_none(line, text_field)
            if text == "":
                remarks.add(EMPTY, f"{content.path.name}, line {number}{after}")
                continue
            if text is not None and has_halves(text):
                remarks.add(HALVES, f"{content.path.name}, line {number}{after}")
        lines.extend((begin, begin + len(line), number))

    def read(index: int) -> str:
        begin, end, number = lines[3 * index : 3 * index + 3]
        place = f"data source {content.path}, line {number}{after}"
        try:
            record = json.loads(content.text(begin, end))
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not valid JSON ({error})") from None
        return whole_characters(field_of(record, text_field, place) or "")

    return Documents(range(len(lines) // 3), read, remarks)


def _text_or_none(line: bytes, text_field: str) -> str | None:
    """The text of a line, empty for null; None where it cannot be read, which is said later."""
    try:
        return field_of(json.loads(line), text_field, "") or ""
    except (ValueError, RecursionError):
        return None


def _is_of_lines(content: Content) -> bool:
    """Whether a .json file begins with an object, as most of the Hub's do, not with a list."""
    begin = content.begin
    while some := content.read(begin, begin + _SOME_BYTES):
        if some.strip():
            return some.lstrip().startswith(b"{")
        begin += len(some)
    return False


def _json_documents(path: Path, text: str, text_field: str) -> Documents:
    try:
        records: Any = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise InputError(f"data source {path}: not valid JSON ({error})") from None
    if not isinstance(records, list):
        raise InputError(
            f"data source {path}: expected a JSON list of objects, or an object on each line"
        )
    return record_documents(path, "item", records, text_field, range(len(records)))


def _csv_documents(path: Path, text: str, text_field: str) -> Documents:
    limit = csv.field_size_limit(max(1, len(text)))  # the default refuses long documents
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if reader.fieldnames is not None and text_field not in reader.fieldnames:
            raise no_field(f"data source {path}", text_field, reader.fieldnames)
        rows = [(reader.line_num, row) for row in reader]
        numbers, records = [number for number, _ in rows], [row for _, row in rows]
        return record_documents(path, "line", records, text_field, numbers)
    except csv.Error as error:
        raise InputError(f"data source {path}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
