"""Files that are whole or absent: written under another name, flushed to the disk, then renamed.

And the folder of a model by what a user calls it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsify.errors import InputError

EMBEDDED = "embedded"


def embedded_path() -> Path:
    """Folder of the small model that every installation carries (`model.path=embedded`).

    Raises:
        InputError: the installation has no such folder.
    """
    folder = Path(__file__).resolve().parent / EMBEDDED
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model.path=embedded: {folder} holds no model; reinstall, or make another one with "
            "'python -m jobs.pretrain'"
        )
    return folder


def resolve_path(path: str | Path) -> Path:
    """`path` as a folder, with the word "embedded" standing for `embedded_path()`."""
    return embedded_path() if str(path) == EMBEDDED else Path(path)


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn what the file system refuses while the block reads into one line about `what`.

    Raises:
        InputError: no permission, a name that is too long, a loop of links, a disk that fails.
    """
    try:
        yield
    except OSError as error:
        where = (
            f" at {error.filename}" if error.filename and str(error.filename) not in what else ""
        )
        raise InputError(
            f"{what}: cannot be read ({error.strerror or error}{where}); check the name and the "
            "permissions"
        ) from None


def fsync(path: Path) -> None:
    """Wait until a file's or folder's content has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def written_whole(path: Path, *, in_folder: bool = False) -> Iterator[Path]:
    """Write a file or a folder so that `path` is what it was or the whole new one.

    Args:
        path: the name that it takes.
        in_folder: have a writer that makes files of its own beside the one it is told do so in a
            folder, which the next attempt removes with everything in it.

    Yields:
        A path beside `path` to write to. When the block ends it is flushed to the disk and takes
        the name; when the block fails `path` stays as it was, and what was written lies there until
        the next attempt. A folder's name must be free, and its files are the caller's to flush.
    """
    place = path.with_name(f".{path.name}.tmp")
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    temporary = place
    if in_folder:
        place.mkdir()
        temporary = place / path.name
    yield temporary
    fsync(temporary)
    temporary.replace(path)
    if in_folder:
        place.rmdir()
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
