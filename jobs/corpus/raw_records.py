"""Records with all their fields, whatever format they come in; a plain text is {"text": ...}.

The counterpart of `text_files` and `file_parts`, which read one field. A part is read one record
after another; of parquet some row groups are in memory, of JSON, CSV, Arrow and what is compressed
the whole file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.options.data import DataConfig
from jobs.corpus.builtin import BUILT_IN
from jobs.corpus.content import Content
from jobs.corpus.documents import Remarks
from jobs.corpus.file_parts import Part, cut_source, gathered, part_lines, read_part
from jobs.corpus.places import (
    HUB,
    TEXT_SUFFIXES,
    existing_path,
    full_name,
    kind_of,
    source_files,
    split_suffix,
)
from jobs.corpus.survey import survey_source
from jobs.corpus.tables import arrow, load_hub_dataset, load_saved_dataset
from jobs.corpus.text_files import is_dataset
from sparsify.errors import InputError, first_line
from sparsify.files import file_sha256

_BATCH_ROWS = 1000

_PART_BYTES = 1 << 26  # of JSON lines in memory at a time where a source is read from end to end

_RECORDS = (".parquet", ".arrow")  # of columns


@dataclass(frozen=True)
class RecordPart:
    """A part of a source, and how its records are numbered."""

    part: Part
    is_table: bool
    """of columns: rows of parquet, Arrow, or a data set"""


def cut_records(name: str, data: DataConfig, part_bytes: int) -> list[list[RecordPart]]:
    """The parts of a source, gathered into shards of about `part_bytes`; as `cut_source`.

    Raises:
        InputError: the source is missing or cannot be read.
    """
    name = full_name(name, BUILT_IN)
    if name in BUILT_IN:
        shards = cut_source(name, None, data, part_bytes)
        return [[RecordPart(part, False) for part in shard] for shard in shards]
    if name.startswith(HUB) or is_dataset(name):
        parts = _cut_dataset(name, part_bytes)
    else:
        parts = []
        for file in source_files(existing_path(name, BUILT_IN)):
            kind = kind_of(file)[0]
            if kind == ".parquet":
                parts += _cut_parquet(file, part_bytes)
            elif kind == ".arrow":
                parts.append(Part("file", str(file), 0, 0, file.stat().st_size))
            else:
                parts += [p for s in cut_source(str(file), None, data, part_bytes) for p in s]
    shards = gathered(parts, part_bytes)
    return [[RecordPart(part, _is_table(part)) for part in shard] for shard in shards]


def _is_table(part: Part) -> bool:
    return part.kind in ("rows", "documents") or kind_of(Path(part.name))[0] in _RECORDS


def source_digest(name: str, data: DataConfig, remarks: Remarks) -> str:
    """SHA-256 (hex) of what a source holds: of its files, in their order.

    Args:
        name: of the source.
        data: names the separator.
        remarks: told which files of a folder are left out.

    Cost: reads all of it once.
    """
    name = full_name(name, BUILT_IN)
    if name in BUILT_IN:
        return survey_source(data, name, None).fingerprint
    if name.startswith(HUB) or is_dataset(name):
        return hashlib.sha256(str(_dataset(name)._fingerprint).encode()).hexdigest()
    digest = hashlib.sha256()
    for file in source_files(existing_path(name, BUILT_IN), remarks):
        digest.update(f"{file.suffix} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def read_records(found: RecordPart, data: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, record) of every record that begins in a part.

    Raises:
        InputError: the file, or a record when it is reached, cannot be read.
    """
    part, path = found.part, Path(found.part.name)
    kind, compression = kind_of(path)
    if found.is_table:
        yield from _table_records(part)
    elif part.kind == "lines":
        yield from _json_lines(*part_lines(Content(path), part))
    elif part.kind == "file" and kind not in TEXT_SUFFIXES:
        content = Content.of_file(path, compression)
        yield from _csv(content) if kind == ".csv" else _json(content, kind == ".jsonl")
    else:
        for index, text in enumerate(read_part(part, None, data)):
            yield f"data source {path}, document {index} after {part.start}", {"text": text}


def records_of(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, record) of every record of a source, in order; read as they come.

    Raises:
        InputError: the source is missing, or it or a record cannot be read.
    """
    data = DataConfig()
    for shard in cut_records(name, data, _PART_BYTES):
        for part in shard:
            yield from read_records(part, data)


def table_schema(found: RecordPart) -> Any:
    """The Arrow schema of a part of a table; None of other parts."""
    part = found.part
    if not found.is_table:
        return None
    if part.kind == "documents":
        return _dataset(part.name).features.arrow_schema
    if part.kind == "rows":
        return arrow().parquet.read_schema(part.name).remove_metadata()
    return _arrow_table(Path(part.name)).schema.remove_metadata()


# --- tables ----------------------------------------------------------------------------------


def _cut_parquet(path: Path, part_bytes: int) -> list[Part]:
    """Row groups, larger ones in as many pieces as `part_bytes` asks for."""
    pyarrow, parts, first = arrow(), [], 0
    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data source {path}: not valid parquet ({first_line(error)})") from None
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        num_parts = max(1, min(group.num_rows, -(-group.total_byte_size // part_bytes)))
        edges = [first + group.num_rows * i // num_parts for i in range(num_parts + 1)]
        size = group.total_byte_size // num_parts
        parts += [Part("rows", str(path), a, b, size) for a, b in itertools.pairwise(edges)]
        first += group.num_rows
    return parts


def _cut_dataset(name: str, part_bytes: int) -> list[Part]:
    dataset = _dataset(name)
    num_rows = len(dataset)
    if not num_rows:
        raise InputError(f"data source {name}: no rows in it; give a source that has some")
    row_bytes = max(1, dataset.data.nbytes // num_rows)
    step = max(1, part_bytes // row_bytes)
    return [
        Part("documents", name, a, min(a + step, num_rows), row_bytes * step)
        for a in range(0, num_rows, step)
    ]


def _dataset(name: str) -> Any:
    return (
        load_hub_dataset(name) if name.startswith(HUB) else load_saved_dataset(*split_suffix(name))
    )


def _table_records(part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
    path, pyarrow = Path(part.name), arrow()
    try:
        for first, table in _tables(part, path):
            for begin in range(0, len(table), _BATCH_ROWS):
                rows = table.slice(begin, _BATCH_ROWS).to_pylist()
                for number, row in enumerate(rows, first + begin):
                    yield f"data source {part.name}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data source {path}: cannot be read ({first_line(error)})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"data source {path}: a text is not UTF-8 ({error})") from None


def _tables(part: Part, path: Path) -> Iterator[tuple[int, Any]]:
    """(number of its first row, Arrow table), together the rows of a part."""
    if part.kind == "documents":
        rows = _dataset(part.name).with_format("arrow")
        for begin in range(part.start, part.stop, _BATCH_ROWS):
            yield begin, rows[begin : min(begin + _BATCH_ROWS, part.stop)]
    elif part.kind == "rows":
        with arrow().parquet.ParquetFile(path) as file:
            end = 0
            for index in range(file.metadata.num_row_groups):
                start, end = end, end + file.metadata.row_group(index).num_rows
                low, high = max(start, part.start), min(end, part.stop)
                if low < high:
                    yield low, file.read_row_group(index).slice(low - start, high - low)
    else:
        yield 0, _arrow_table(path)


def _arrow_table(path: Path) -> Any:
    pyarrow = arrow()
    source = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source).read_all()


# --- JSON and CSV ----------------------------------------------------------------------------


def _json_lines(content: Content, after: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for number, (begin, line) in enumerate(content.lines(), 1):
        if not line.strip():
            continue
        place = f"data source {content.path}, line {number}{after}"
        try:
            record = json.loads(content.text(begin, begin + len(line)))
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not valid JSON ({error})") from None
        yield place, _object(record, place)


def _json(content: Content, is_of_lines: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """A JSON list of objects, or an object on each line."""
    if is_of_lines or content.read(content.begin, content.begin + 4096).lstrip().startswith(b"{"):
        yield from _json_lines(content)
        return
    try:
        records: Any = json.loads(content.text(content.begin, content.size))
    except (ValueError, RecursionError) as error:
        raise InputError(f"data source {content.path}: not valid JSON ({error})") from None
    if not isinstance(records, list):
        raise InputError(
            f"data source {content.path}: expected a JSON list of objects, or an object on each "
            "line"
        )
    for number, record in enumerate(records):
        place = f"data source {content.path}, item {number}"
        yield place, _object(record, place)


def _object(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{place}: a {type(record).__name__}, not an object with fields")
    return record


def _csv(content: Content) -> Iterator[tuple[str, dict[str, Any]]]:
    text = content.text(content.begin, content.size)
    limit = csv.field_size_limit(max(1, len(text)))  # the default refuses long documents
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for row in reader:
            yield f"data source {content.path}, line {reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"data source {content.path}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
