"""Large sources in parts that can be read one without the others, on any machine.

Owns how a source is cut. Where the cuts are depends on the source and the wanted size alone, and
the documents of all parts, one part after another, are those of the whole source.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.options.data import DataConfig
from jobs.corpus.builtin import BUILT_IN, builtin_documents
from jobs.corpus.content import Content
from jobs.corpus.places import (
    HUB,
    TEXT_SUFFIXES,
    existing_path,
    full_name,
    kind_of,
    source_files,
)
from jobs.corpus.tables import column_documents, parquet_file
from jobs.corpus.text_files import (
    is_dataset,
    is_line,
    json_lines,
    plain_text,
    read_file,
    read_source,
)

_COMPRESSION = 4  # bytes of text per byte of a compressed file, roughly

_BLOCK_BYTES = 1 << 16

_SAMPLED_DOCUMENTS = 100  # read to know how long the documents of a data set are


@dataclass(frozen=True)
class Part:
    """A part of a source."""

    kind: str
    """file (whole), text, split text (with separators) or lines (bytes), rows (of parquet),
    documents (of a data set)"""
    name: str
    """the file, or the source whose documents are meant"""
    start: int
    stop: int
    """bytes, rows or documents, from start to before stop; of plain text the bytes of whole
    documents, of JSON lines a line belongs to the part in which it begins"""
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
    name = full_name(name, BUILT_IN)
    if name in BUILT_IN or name.startswith(HUB) or is_dataset(name):
        parts = _cut_documents(name, held_out, config, part_bytes)
    else:
        files = source_files(existing_path(name, BUILT_IN))
        parts = [part for file in files for part in _cut_file(file, config, part_bytes)]
    return gathered(parts, part_bytes)


def gathered(parts: Sequence[Part], part_bytes: int) -> list[list[Part]]:
    """Parts, in their order, as shards of about `part_bytes` of text; larger ones stand alone."""
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
    content = Content(path)
    if part.kind in ("text", "split text"):
        text = Content(path, content.read(part.start, part.stop), part.start)
        return plain_text(text, config.separator, part.kind == "split text")
    lines, after = part_lines(content, part)
    return json_lines(lines, config.text_field, after)


def part_lines(content: Content, part: Part) -> tuple[Content, str]:
    """The lines of a file that begin in a part, and where in it counting them begins."""
    begin, end = (_next_line(content, offset) for offset in (part.start, part.stop))
    lines = Content(content.path, content.read(begin, end), begin)
    return lines, f" after byte {begin}" if begin else ""


def _cut_file(path: Path, config: DataConfig, part_bytes: int) -> list[Part]:
    kind, compression = kind_of(path)
    size = path.stat().st_size
    if kind == ".parquet":
        return _cut_parquet(path, config.text_field, part_bytes)
    if compression is not None:
        return [Part("file", str(path), 0, 0, size * _COMPRESSION)]
    cuts = _even(size, -(-size // part_bytes))
    if kind in TEXT_SUFFIXES and is_line(config.separator):
        content = Content.of_file(path, None)
        if content.is_file:
            return _cut_text(content, config.separator, cuts)
    elif kind == ".jsonl" and Content.of_file(path, None).is_file:
        return [Part("lines", str(path), *cut) for cut in cuts]
    return [Part("file", str(path), 0, 0, size)]


def _cut_text(content: Content, separator: str, cuts: Sequence[tuple[int, int, int]]) -> list[Part]:
    """Parts of whole documents: each belongs to the cut in which its mark lies."""
    text = plain_text(content, separator)
    kind, path = "split text" if text.is_split else "text", str(content.path)
    firsts = [bisect_left(text.marks, begin) for begin, _, _ in cuts[1:]]
    parts = []
    for (first, last), cut in zip(
        itertools.pairwise([0, *firsts, len(text.marks)]), cuts, strict=True
    ):
        begin, end = (text.spans[2 * first], text.spans[2 * last - 1]) if first < last else (0, 0)
        parts.append(Part(kind, path, begin, end, cut[2]))
    return parts


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


def _next_line(content: Content, offset: int) -> int:
    """Where the first line begins that begins at `offset` or after it."""
    begin = offset - 1
    while offset and (block := content.read(begin, begin + _BLOCK_BYTES)):
        if (at := block.find(b"\n")) >= 0:
            return begin + at + 1
        begin += len(block)
    return content.size if offset else 0
