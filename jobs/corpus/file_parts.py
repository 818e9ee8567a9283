"""Large sources in parts that can be read one without the others, on any machine.

Owns how a source is cut. Where the cuts are depends on the source and the wanted size alone, and
the documents of all parts, one part after another, are those of the whole source.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from conf.options.data import DataConfig
from jobs.corpus.builtin import BUILT_IN, builtin_documents
from jobs.corpus.text_files import (
    TEXT_SUFFIXES,
    as_text,
    column_documents,
    existing_path,
    is_dataset,
    json_lines,
    kind_of,
    parquet_file,
    read_file,
    read_source,
    source_files,
    split_text,
    unreadable,
)

_COMPRESSION = 4  # bytes of text per byte of a compressed file, roughly

_SAMPLED_DOCUMENTS = 100  # read to know how long the documents of a data set are


@dataclass(frozen=True)
class Part:
    """A part of a source."""

    kind: str
    """file (whole), text or lines (bytes), rows (of parquet), documents (of a data set)"""
    name: str
    """the file, or the source whose documents are meant"""
    start: int
    stop: int
    """bytes, rows or documents, from start to before stop; a document belongs to the part in which
    it begins"""
    num_bytes: int
    """about how much text"""


def cut_source(
    name: str, held_out: bool | None, config: DataConfig, part_bytes: int
) -> list[list[Part]]:
    """The parts of a source, gathered into shards of about `part_bytes` of text.

    Args:
        name: as in `jobs.corpus.sources.open_source`.
        held_out: side of a built-in source; other sources are taken whole.
        config: names the text field and the separator.
        part_bytes: a larger file is cut, if its format lets it: plain text at separator lines,
            JSON lines, parquet in row groups or within them. Data sets and built-in sources are cut
            between documents. Small files go together.

    Raises:
        InputError: the source is missing or cannot be read.
    """
    if name in BUILT_IN or name.startswith("hf:") or is_dataset(name):
        parts = _cut_documents(name, held_out, config, part_bytes)
    else:
        files = source_files(existing_path(name, BUILT_IN))
        parts = [part for file in files for part in _cut_file(file, config, part_bytes)]
    shards: list[list[Part]] = []
    num_bytes = 0
    for part in parts:
        if not shards or num_bytes + part.num_bytes > part_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(part)
        num_bytes += part.num_bytes
    return shards


def read_part(part: Part, held_out: bool | None, config: DataConfig) -> Sequence[str]:
    """The documents that begin in a part.

    Raises:
        InputError: the file cannot be read (now), or a record in it (when it is reached).
    """
    if part.kind == "documents":
        return _documents(part.name, held_out, config)[part.start : part.stop]
    path = Path(part.name)
    if part.kind == "file":
        return read_file(path, config.text_field, config.separator)
    if part.kind == "rows":
        return _read_rows(path, part, config.text_field)
    try:
        with path.open("rb") as file:
            if part.kind == "text":
                return _read_text(file, part, config.separator)
            return _read_lines(file, part, config.text_field)
    except OSError as error:
        raise unreadable(path, error) from None


def _cut_file(path: Path, config: DataConfig, part_bytes: int) -> list[Part]:
    kind, compression = kind_of(path)
    size = path.stat().st_size
    if kind == ".parquet":
        return _cut_parquet(path, config.text_field, part_bytes)
    if compression is None and kind == ".jsonl":
        return [Part("lines", str(path), *cut) for cut in _even(size, -(-size // part_bytes))]
    is_line = config.separator == config.separator.strip(" \t") and "\n" not in config.separator
    if compression is None and kind in TEXT_SUFFIXES and is_line:
        return [Part("text", str(path), *cut) for cut in _even(size, -(-size // part_bytes))]
    return [Part("file", str(path), 0, 0, size * (_COMPRESSION if compression else 1))]


def _even(size: int, num_parts: int, first: int = 0) -> list[tuple[int, int, int]]:
    """(start, stop, length) of pieces from `first` on, as equal as can be; one at the least."""
    num_parts = max(1, num_parts)
    edges = [first + size * i // num_parts for i in range(num_parts + 1)]
    return [(a, b, b - a) for a, b in itertools.pairwise(edges)]


def _cut_parquet(path: Path, text_field: str, part_bytes: int) -> list[Part]:
    parts = []
    first_row = 0
    with parquet_file(path, text_field) as file:
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            columns = [group.column(i) for i in range(group.num_columns)]
            size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_field)
            num_parts = max(1, min(group.num_rows, -(-size // part_bytes)))
            cuts = _even(group.num_rows, num_parts, first_row)
            parts += [Part("rows", str(path), a, b, size // num_parts) for a, b, _ in cuts]
            first_row += group.num_rows
    return parts


def _cut_documents(
    name: str, held_out: bool | None, config: DataConfig, part_bytes: int
) -> list[Part]:
    documents = _documents(name, held_out, config)
    num_sampled = min(len(documents), _SAMPLED_DOCUMENTS)
    sampled = [documents[len(documents) * i // num_sampled] for i in range(num_sampled)]
    mean_bytes = max(
        1, sum(len(text.encode("utf-8", "replace")) for text in sampled) // num_sampled
    )
    pieces = _even(len(documents), -(-len(documents) // max(1, part_bytes // mean_bytes)))
    return [Part("documents", name, a, b, length * mean_bytes) for a, b, length in pieces]


def _documents(name: str, held_out: bool | None, config: DataConfig) -> Sequence[str]:
    if name in BUILT_IN:
        return builtin_documents(name, held_out)
    return read_source(name, config.text_field, config.separator, BUILT_IN)


def _read_rows(path: Path, part: Part, text_field: str) -> Sequence[str]:
    with parquet_file(path, text_field) as file:
        wanted: list[int] = []
        first_row = end = 0
        for index in range(file.metadata.num_row_groups):
            start, end = end, end + file.metadata.row_group(index).num_rows
            if start < part.stop and end > part.start:
                first_row = first_row if wanted else start
                wanted.append(index)
        table = file.read_row_groups(wanted, columns=[text_field])
        table = table.slice(part.start - first_row, part.stop - part.start)
        return column_documents(path, table, text_field, part.start)


def _next_line(file: IO[bytes], offset: int) -> int:
    """Where the first line begins that begins at `offset` or after it."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    file.readline()
    return file.tell()


def _next_separator(file: IO[bytes], offset: int, separator: bytes) -> tuple[int, int]:
    """Begin and end of the first separator line that begins at `offset` or after it.

    The end of the file, twice, when there is none.
    """
    begin = _next_line(file, offset)
    file.seek(begin)
    for line in file:
        text = line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line
        if text.strip(b" \t") == separator:
            return begin, begin + len(line)
        begin += len(line)
    return begin, begin


def _read_text(file: IO[bytes], part: Part, separator: str) -> list[str]:
    """The documents after the separator lines that begin in the part, the first one's before."""
    mark = separator.encode()
    begin = _next_separator(file, part.start, mark)[0] if part.start else 0
    if part.start and begin >= part.stop:
        return []
    # With the separator that ends it, so that text before it is known not to be the whole file.
    end = _next_separator(file, part.stop, mark)[1]
    return split_text(as_text(Path(part.name), _bytes(file, begin, end), begin), separator)


def _read_lines(file: IO[bytes], part: Part, text_field: str) -> Sequence[str]:
    begin, end = (_next_line(file, offset) for offset in (part.start, part.stop))
    text = as_text(Path(part.name), _bytes(file, begin, end), begin)
    return json_lines(Path(part.name), text, text_field, f" after byte {begin}" if begin else "")


def _bytes(file: IO[bytes], begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)
