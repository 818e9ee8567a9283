"""Documents out of columns: parquet and Arrow files, and data sets of `datasets`.

Both libraries are imported when there is something to read with them: few runs need them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from jobs.corpus.documents import EMPTY, Documents, Remarks
from jobs.corpus.places import HUB, split_suffix
from jobs.corpus.records import no_field, not_text
from sparsify.errors import InputError, first_line

_BATCH_ROWS = 10_000


def arrow() -> Any:
    """The package pyarrow, with its modules for computing and parquet."""
    import pyarrow.compute  # here: machines that read other text may do without it
    import pyarrow.parquet

    return pyarrow


@contextmanager
def parquet_file(path: Path, text_field: str) -> Iterator[Any]:
    """The opened file (pyarrow.parquet.ParquetFile), which has the field.

    Raises:
        InputError: it cannot be read, then or while it is open, or lacks the field.
    """
    pyarrow = arrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if text_field not in fields:
                raise no_field(f"data source {path}", text_field, fields)
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data source {path}: not valid parquet ({first_line(error)})") from None


def parquet_documents(path: Path, text_field: str) -> Documents:
    """The texts of a column of a parquet file."""
    with parquet_file(path, text_field) as file:
        return column_documents(path, file.read(columns=[text_field]), text_field)


def arrow_documents(path: Path, text_field: str) -> Documents:
    """The texts of a column of an Arrow file, of the kind that `datasets` writes or the other."""
    pyarrow = arrow()
    try:
        source = pyarrow.memory_map(str(path))
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(source).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data source {path}: not valid Arrow ({first_line(error)})") from None
    if text_field not in table.column_names:
        raise no_field(f"data source {path}", text_field, table.column_names)
    return column_documents(path, table, text_field)


def column_documents(path: Path, table: Any, text_field: str, first_row: int = 0) -> Documents:
    """The texts of one column of an Arrow table that begins at row `first_row` of its file.

    Raises:
        InputError: the column holds something else (now), or a text is not UTF-8 (when it is
            reached).
    """
    column = table.column(text_field)
    place, remarks = f"data source {path}, row", Remarks()
    has_text = _has_text(column, f"data source {path}", text_field)
    rows = [row for row, kept in enumerate(has_text) if kept]
    for row in (row for row, kept in enumerate(has_text) if not kept):
        remarks.add(EMPTY, f"{path.name}, row {first_row + row}")
    return Documents(rows, lambda row: _value(column[row], f"{place} {first_row + row}"), remarks)


def _has_text(column: Any, place: str, text_field: str) -> list[bool]:
    """Which rows of an Arrow column hold a text that is neither null nor empty."""
    pyarrow = arrow()
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if pyarrow.types.is_null(kind):
        return [False] * len(column)
    kinds = pyarrow.types
    if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)):
        raise not_text(place, text_field, str(kind))
    lengths = pyarrow.compute.binary_length(column)
    return [bool(kept) for kept in pyarrow.compute.greater(lengths, 0).to_pylist()]


def _value(value: Any, place: str) -> str:
    try:
        return str(value.as_py())
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: not UTF-8 at byte {error.start} of the text; write the file again from text "
            "in UTF-8"
        ) from None


def load_saved_dataset(path: Path, split: str | None) -> Any:
    """The data set of a folder that `datasets` saved.

    Raises:
        InputError: it cannot be read, or has no such split.
    """
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
    spec, _, split = name.removeprefix(HUB).partition("@")
    repository, _, config = spec.partition(":")
    try:
        return _datasets().load_dataset(repository, config or None, split=split or "train")
    except Exception as error:
        raise InputError(
            f"data source {name}: no such file or folder, and as a data set of the Hub it cannot "
            f"be loaded ({type(error).__name__}: {first_line(error)}); check the name "
            "(hf:NAME[:CONFIG][@SPLIT]) and the network, or give a local file"
        ) from None


def _datasets() -> ModuleType:
    import datasets  # here: it takes seconds, and few runs read a data set

    return datasets


def dataset_documents(name: str, text_field: str) -> Documents:
    """The texts of a data set, `hf:NAME` or a saved folder with or without @SPLIT."""
    is_hub = name.startswith(HUB)
    dataset = load_hub_dataset(name) if is_hub else load_saved_dataset(*split_suffix(name))
    place = f"data source {name}"
    if text_field not in dataset.column_names:
        raise no_field(place, text_field, dataset.column_names)
    if len(dataset) == 0:
        raise InputError(f"{place}: no rows in it; give a source that has some")
    column = dataset.select_columns([text_field]).with_format("arrow")
    remarks, rows, first = Remarks(), [], 0
    for table in column.iter(_BATCH_ROWS):
        for row, kept in enumerate(_has_text(table.column(text_field), place, text_field), first):
            if kept:
                rows.append(row)
            else:
                remarks.add(EMPTY, f"row {row}")
        first += len(table)

    def read(row: int) -> str:
        found: Sequence[Any] = column[row].column(text_field)
        return _value(found[0], f"{place}, row {row}")

    return Documents(rows, read, remarks)
