"""Documents out of files, folders and datasets, read as late as their format allows.

Owns file formats. Knows nothing of splits, tokens or configuration: a source gives a sequence of
strings, in an order that depends on its content alone, or an InputError that names the place.

Parquet is read by pyarrow, data sets by `datasets`. JSON and CSV are read here: `datasets` turns
texts that look like dates, numbers or missing values ("2020-01-01", "007", "NA") into such, names
no line in its errors, and takes 1.5 to 5 times as long for it, or a copy of the file on the disk.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsify.errors import InputError, first_line

TEXT_SUFFIXES = (".txt", ".md", ".py")

_RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
}  # fmt: skip

_FORMATS = (
    f"{' '.join(TEXT_SUFFIXES + _RECORD_SUFFIXES)} (text and .jsonl also with "
    f"{' '.join(_OPENERS)} after it)"
)


class Documents(Sequence[str]):
    """A sequence of texts of which each is made when it is asked for."""

    def __init__(self, items: Sequence[Any], read: Callable[[Any], Any] = str) -> None:
        self._items = items
        self._read = read

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._read(self._items[index])


def joined(sources: Sequence[Sequence[str]]) -> Documents:
    """The documents of several sources as one sequence."""
    places = [(source, i) for source in sources for i in range(len(source))]
    return Documents(places, lambda place: place[0][place[1]])


def read_source(name: str, text_field: str, separator: str, known: Sequence[str]) -> Sequence[str]:
    """The documents of a file, a folder or a dataset.

    Args:
        name: a file (plain text, .jsonl, .json, .csv, .parquet), a folder of such files (taken in
            the order of their paths; hidden files and other kinds are passed over), a folder that
            `datasets` saved (`FOLDER` or `FOLDER@SPLIT`), or `hf:NAME[:CONFIG][@SPLIT]`.
        text_field: field of records that holds the text.
        separator: a line of plain text that ends a document.
        known: other names to suggest when there is no such file.

    Raises:
        InputError: the source is missing, empty, unreadable, or lacks the field.
    """
    if name.startswith("hf:"):
        return _dataset_documents(name, load_hub_dataset(name), text_field)
    path, split = existing_path(name, known), _split_suffix(name)[1]
    if path.is_file():
        documents = read_file(path, text_field, separator)
    elif _is_saved_dataset(path):
        return _dataset_documents(name, _load_saved_dataset(path, split), text_field)
    else:
        files = source_files(path)
        documents = joined([read_file(file, text_field, separator) for file in files])
    if not documents:
        raise InputError(f"data source {name}: no text in it; give a source that has some")
    return documents


def source_files(path: Path) -> list[Path]:
    """The files that make up a file or folder source, in the order of their paths.

    For a folder that `datasets` saved, all its files.
    """
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if _is_saved_dataset(path):
        return files
    visible = [p for p in files if not any(x.startswith(".") for x in p.relative_to(path).parts)]
    readable = [p for p in visible if kind_of(p)[0] is not None]
    if not readable:
        found = ", ".join(p.name for p in visible[:3]) or "no files"
        raise InputError(f"data source {path}: a folder with {found}; expected {_FORMATS}")
    return readable


def existing_path(name: str, known: Sequence[str]) -> Path:
    """The file or folder that a source name (not `hf:`) means, without `@SPLIT`.

    Raises:
        InputError: there is none; suggests names from the folder and from `known`.
    """
    path = _split_suffix(name)[0]
    if not path.exists():
        raise InputError(f"data source {name}: {_missing(path, known)}")
    return path


def _split_suffix(name: str) -> tuple[Path, str | None]:
    path, at, split = name.rpartition("@")
    if at and not Path(name).exists() and _is_saved_dataset(Path(path)):
        return Path(path), split
    return Path(name), None


def _missing(path: Path, known: Sequence[str]) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = [str(folder / n) for n in difflib.get_close_matches(path.name, names, 3, 0.6)]
    close = difflib.get_close_matches(str(path), known, 1, 0.6) + close
    if close:
        return f"there is no such file or folder; close to it: {', '.join(close)}"
    where = "" if folder.is_dir() else f" (nor the folder {folder})"
    return f"there is no such file or folder{where}; give a path or one of {', '.join(known)}"


def kind_of(path: Path) -> tuple[str | None, str | None]:
    """(format suffix, compression suffix) of a file name; format None when it cannot be read."""
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else None
    kind = suffixes[-1] if suffixes else None
    allowed = TEXT_SUFFIXES + ((".jsonl",) if compression else _RECORD_SUFFIXES)
    return (kind if kind in allowed else None), compression


def read_file(path: Path, text_field: str, separator: str) -> Sequence[str]:
    """The documents of one file, which is read whole."""
    kind, compression = kind_of(path)
    if kind is None:
        raise InputError(f"data source {path}: format not known; expected {_FORMATS}")
    if kind == ".parquet":
        return _parquet_documents(path, text_field)
    text = _decoded(path, compression)
    if kind in TEXT_SUFFIXES:
        return split_text(text, separator)
    if kind == ".jsonl":
        return json_lines(path, text, text_field)
    if kind == ".json":
        return _json_documents(path, text, text_field)
    return _csv_documents(path, text, text_field)


def _decoded(path: Path, compression: str | None) -> str:
    try:
        if compression is None:
            raw = path.read_bytes()
        else:
            with _OPENERS[compression](path) as file:
                raw = file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise unreadable(path, error) from None
    return as_text(path, raw)


def unreadable(path: Path, error: Exception) -> InputError:
    """The error of a file that cannot be opened or read."""
    return InputError(
        f"data source {path}: cannot be read ({error}); check the file and its permissions"
    )


def as_text(path: Path, raw: bytes, offset: int = 0) -> str:
    """Bytes of a file, `offset` bytes from its start, as text with plain line ends."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data source {path}: not UTF-8 at byte {offset + error.start} "
            f"(0x{raw[error.start]:02x}); convert it, for example with iconv -t utf-8"
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def split_text(text: str, separator: str) -> list[str]:
    """Documents between separator lines; a text without such a line is one document as it is."""
    parts = re.split(rf"^[ \t]*{re.escape(separator)}[ \t]*$", text, flags=re.MULTILINE)
    if len(parts) > 1:
        parts = [part.strip("\n") for part in parts]
    return [part for part in parts if part.strip()]


def _field(record: Any, text_field: str, place: str) -> str:
    if not isinstance(record, dict):
        raise InputError(f"{place}: a {type(record).__name__}, not an object with fields")
    if text_field not in record:
        raise _no_field(place, text_field, list(record))
    value = record[text_field]
    if not isinstance(value, str):
        raise InputError(
            f"{place}: field {text_field!r} is {type(value).__name__}, not a string; set "
            "data.text_field to the field with the text"
        )
    return value


def _no_field(place: str, text_field: str, fields: Sequence[str]) -> InputError:
    return InputError(
        f"{place}: no field {text_field!r}; the fields are {', '.join(fields) or 'none'}; set "
        "data.text_field"
    )


def json_lines(path: Path, text: str, text_field: str, after: str = "") -> Documents:
    """The documents of JSON lines; `after` says where in the file counting lines began."""
    # Not splitlines(): that also breaks at characters that JSON strings may hold.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    place = f"data source {path}, line"
    return Documents(
        lines, lambda item: _json_line(f"{place} {item[0]}{after}", item[1], text_field)
    )


def _json_line(place: str, line: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not valid JSON ({error})") from None
    return _field(record, text_field, place)


def _records(place: str, records: Sequence[Any], text_field: str, first: int = 0) -> Documents:
    """The texts of records, each named by `place` and its number from `first` on."""
    return Documents(
        range(len(records)), lambda i: _field(records[i], text_field, f"{place} {first + i}")
    )


def _json_documents(path: Path, text: str, text_field: str) -> Documents:
    try:
        records = json.loads(text) if text.strip() else []
    except ValueError as error:
        hint = "; one object per line belongs in a .jsonl file" if "Extra" in str(error) else ""
        raise InputError(f"data source {path}: not valid JSON ({error}){hint}") from None
    if not isinstance(records, list):
        raise InputError(f"data source {path}: expected a JSON list of objects")
    return _records(f"data source {path}, item", records, text_field)


def _csv_documents(path: Path, text: str, text_field: str) -> list[str]:
    limit = csv.field_size_limit(max(1, len(text)))  # the default refuses long documents
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if reader.fieldnames is not None and text_field not in reader.fieldnames:
            raise _no_field(f"data source {path}", text_field, reader.fieldnames)
        return [
            _field(row, text_field, f"data source {path}, line {reader.line_num}") for row in reader
        ]
    except csv.Error as error:
        raise InputError(f"data source {path}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _parquet_documents(path: Path, text_field: str) -> Documents:
    with parquet_file(path, text_field) as file:
        return column_documents(path, file.read(columns=[text_field]), text_field)


@contextmanager
def parquet_file(path: Path, text_field: str) -> Iterator[Any]:
    """The opened file (pyarrow.parquet.ParquetFile), which has the field.

    Raises:
        InputError: it cannot be read, then or while it is open, or lacks the field.
    """
    import pyarrow.parquet  # here: machines that read other text may do without it

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if text_field not in fields:
                raise _no_field(f"data source {path}", text_field, fields)
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data source {path}: not valid parquet ({first_line(error)})") from None


def column_documents(path: Path, table: Any, text_field: str, first_row: int = 0) -> Documents:
    """The texts of one column of an Arrow table that begins at row `first_row` of its file."""
    column: Any = table.column(text_field)
    records: Sequence[Any] = Documents(column, lambda value: {text_field: value.as_py()})
    return _records(f"data source {path}, row", records, text_field, first_row)


def is_dataset(name: str) -> bool:
    """Whether a source (not `hf:`) is a folder that `datasets` saved, with or without @SPLIT."""
    return _is_saved_dataset(_split_suffix(name)[0])


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def _datasets() -> ModuleType:
    import datasets  # here: it takes seconds, and few runs read a data set

    return datasets


def _load_saved_dataset(path: Path, split: str | None) -> Any:
    try:
        dataset = _datasets().load_from_disk(str(path))
    except Exception as error:
        raise InputError(
            f"data source {path}: not a usable dataset folder ({first_line(error)})"
        ) from None
    if isinstance(dataset, dict):
        wanted = split or "train"
        if wanted not in dataset:
            raise InputError(
                f"data source {path}: no split {wanted!r}; the splits are {', '.join(dataset)}; "
                "write FOLDER@SPLIT"
            )
        return dataset[wanted]
    if split is not None:
        raise InputError(f"data source {path}: a dataset without splits; leave out @{split}")
    return dataset


def load_hub_dataset(name: str) -> Any:
    """The dataset `hf:NAME[:CONFIG][@SPLIT]` (split "train" if none is named).

    Raises:
        InputError: it cannot be had: wrong name, no network, code needed.
    """
    spec, _, split = name.removeprefix("hf:").partition("@")
    repository, _, config = spec.partition(":")
    try:
        return _datasets().load_dataset(repository, config or None, split=split or "train")
    except Exception as error:
        raise InputError(
            f"data source {name}: cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            "check the name (hf:NAME[:CONFIG][@SPLIT]) and the network, or give a local file"
        ) from None


def _dataset_documents(name: str, dataset: Any, text_field: str) -> Documents:
    place = f"data source {name}"
    if text_field not in dataset.column_names:
        raise _no_field(place, text_field, dataset.column_names)
    if len(dataset) == 0:
        raise InputError(f"{place}: no rows in it; give a source that has some")
    return _records(f"{place}, row", dataset.select_columns([text_field]), text_field)
