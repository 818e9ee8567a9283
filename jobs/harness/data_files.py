"""The local data files of a task's definition: where they are, and whether they fit each other."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.corpus.tables import arrow
from sparsify.errors import InputError, first_line
from sparsify.files import readable

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")

_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
"""values of dataset_path that read files"""


def with_absolute_paths(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The definition with data files that are meant from its own folder as absolute paths."""
    found = dict(config)
    data = config.get("dataset_path")
    if isinstance(data, str) and data not in _BUILDERS and (folder / data).expanduser().exists():
        found["dataset_path"] = _absolute(data, folder)
    options = config.get("dataset_kwargs")
    if isinstance(options, dict):
        options = dict(options)
        for key in ("data_files", "data_dir"):
            if key in options:
                options[key] = _absolute(options[key], folder)
        found["dataset_kwargs"] = options
    return found


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(one, folder) for key, one in value.items()}
    if isinstance(value, list):
        return [_absolute(one, folder) for one in value]
    if not isinstance(value, str) or "://" in value:
        return value
    return str((folder / Path(value).expanduser()).absolute())


def _by_split(config: dict[str, Any]) -> dict[str, list[str]]:
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files is None:
        return {}
    splits = files if isinstance(files, dict) else {"train": files}
    return {
        str(split): [str(one) for one in (paths if isinstance(paths, list) else [paths])]
        for split, paths in splits.items()
    }


def local_files(config: dict[str, Any]) -> list[Path]:
    """The data files of a definition that are on this machine."""
    patterns = [path for paths in _by_split(config).values() for path in paths if "://" not in path]
    return [Path(found) for pattern in patterns for found in sorted(glob.glob(pattern))]


def check_data(config: dict[str, Any], where: str) -> None:
    """Require that data files are there, have the splits that are used, and the same columns.

    Args:
        config: a definition with absolute paths.
        where: begins messages.

    Raises:
        InputError: they do not.

    Cost: reads JSON files whole, and of others the header.
    """
    splits = _by_split(config)
    for split, patterns in splits.items():
        for pattern in patterns:
            if "://" not in pattern and not glob.glob(pattern):
                raise InputError(f"{where}: data file of split {split}: {pattern} is not there")
    for key in _SPLITS if splits else ():
        name = str(config.get(key) or "").partition("[")[0]
        if name and name not in splits:
            raise InputError(
                f"{where}: {key}: {name} is no split of its data_files, which have "
                f"{', '.join(splits)}"
            )
    read = _COLUMNS.get(str(config.get("dataset_path")))
    if read is None or set(config.get("dataset_kwargs") or ()) - {"data_files"}:
        return  # others say themselves which columns they have
    first: tuple[Path, set[str]] | None = None
    for path in local_files(config):
        with readable(f"{where}: data file {path}"):
            columns = read(path)
        if columns is None:
            continue
        first = first or (path, columns)
        if odd := sorted(columns ^ first[1]):
            raise InputError(
                f"{where}: {path} and {first[0]} have different columns ({', '.join(odd)} in one "
                "of them alone), and all splits need the same; give both the same"
            )


def _json_columns(path: Path) -> set[str] | None:
    if path.suffix not in (".json", ".jsonl"):
        return None  # compressed
    columns: set[str] = set()
    at = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return {key for row in json.loads(text) for key in dict(row)}
        for number, line in enumerate(text.split("\n"), 1):
            at = f", line {number}"
            if line.strip():
                columns |= set(dict(json.loads(line)))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"evaluate.tasks: data file {path}{at}: no JSON object ({first_line(error)})"
        ) from None
    return columns


def _csv_columns(path: Path) -> set[str] | None:
    if path.suffix != ".csv":
        return None
    with path.open(encoding="utf-8-sig", newline="") as file:
        return set(next(csv.reader(file), []))


def _parquet_columns(path: Path) -> set[str]:
    pyarrow = arrow()
    try:
        return set(pyarrow.parquet.read_schema(path).names)
    except pyarrow.ArrowException as error:
        raise InputError(
            f"evaluate.tasks: data file {path}: not valid parquet ({first_line(error)})"
        ) from None


_COLUMNS: dict[str, Callable[[Path], set[str] | None]] = {
    "json": _json_columns, "csv": _csv_columns, "parquet": _parquet_columns,
}  # fmt: skip
