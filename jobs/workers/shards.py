"""A folder of files that are made one by one, by any worker, and a manifest that comes last.

While files are missing, a folder of state inside says what they are made from and has a record of
each one that is whole, so that the same command goes on and another one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs.runs.artifact import differences
from jobs.runs.folder import write_json
from sparsify.data.shards import MANIFEST
from sparsify.errors import InputError

_BEGUN = "begun.json"

_RECORD = ".shard.json"


def require_same(option: str, out: Path, old: Any, new: dict[str, Any], what: str) -> None:
    """Require that `what`, in the folder that `option` names, is made from the same as now.

    Raises:
        InputError: it is not.
    """
    if changes := differences(old, new):
        raise InputError(
            f"{option}={out}: {what} was made from something else ({'; '.join(changes)}); use "
            f"another {option}=, go back to the old values, or remove the folder"
        )


def begun_records(
    option: str, out: Path, state: Path, settings: dict[str, Any], kind: str
) -> list[dict[str, Any]]:
    """The records of files that an interrupted command made; none in an empty folder.

    Raises:
        InputError: that command made something else, or the folder holds other files.
    """
    begun = state / _BEGUN
    if begun.is_file():
        was = json.loads(begun.read_text(encoding="utf-8"))
        require_same(option, out, was, settings, f"the interrupted {kind}")
    elif any(out.glob("[!.]*")):
        raise InputError(f"{option}={out}: holds other files and no {kind}; choose an empty folder")
    paths = sorted(state.glob(f"*{_RECORD}"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def begin(
    out: Path, state: Path, settings: dict[str, Any], whole: Iterable[dict[str, Any]]
) -> None:
    """Turn the folder into one that is being written, if it is not.

    Args:
        out: the folder; its manifest goes.
        state: the folder inside.
        settings: what the files are made from.
        whole: records of the files that are there already.
    """
    state.mkdir(exist_ok=True)
    for record in whole:
        write_record(state, record)
    write_json(state / _BEGUN, settings)
    (out / MANIFEST).unlink(missing_ok=True)


def write_record(state: Path, record: dict[str, Any]) -> None:
    """Note that the file `record["file"]` is whole."""
    write_json(state / f"{record['file']}{_RECORD}", record)


def read_record(state: Path, file: str) -> dict[str, Any]:
    """What was noted of a file."""
    return dict(json.loads((state / f"{file}{_RECORD}").read_text(encoding="utf-8")))
