"""A run's folder: made, locked to one command at a time, its JSON written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparsify import files
from sparsify.errors import InputError, TwofourError


def write_json(path: Path, value: Any) -> None:
    """`files.write_json`, with a full or unwritable disk as one line."""
    with disk_errors(path):
        files.write_json(path, value)


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """An object that `write_json` wrote.

    Args:
        path: of the file.
        fix: what to do when it is damaged; ends the message.

    Raises:
        InputError: it cannot be read, or is not what was written.
        FileNotFoundError: it is not there.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    except ValueError as error:  # cut off, or not UTF-8
        raise InputError(f"{path}: damaged, not JSON ({error}); {fix}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged, a {type(value).__name__} and no object; {fix}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text so that the file is the old one or the whole new one."""
    with disk_errors(path), files.written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cut_torn_line(path: Path) -> int:
    """Cut a last line that a killed process left unfinished; its bytes, 0 without such a line."""
    if not path.is_file():
        return 0
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return len(content) - whole


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one line; other errors pass."""
    try:
        yield
    except Exception as error:
        text = str(error)
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            raise TwofourError(
                f"{path}: the disk is full; free some space and run the same command again "
                "(finished stages are kept)"
            ) from None
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(
                f"{path}: cannot be written ({text}); choose another folder or fix the permissions"
            ) from None
        raise


def prepare_run_dir(run_dir: Path, option: str = "run.dir") -> None:
    """Make the run's folder, which `option` names, and prove that it can be written.

    Raises:
        InputError: it is a file, or cannot be made or written.
    """
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise InputError(f"{option}={run_dir}: is a file; choose a folder")
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".probe"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TwofourError(
                f"{option}={run_dir}: the disk is full; free some space or choose another folder"
            ) from None
        raise InputError(
            f"{option}={run_dir}: cannot be written ({error.strerror}); choose another folder or "
            "fix the permissions"
        ) from None


_ENDING_S = 10.0
"""for the workers of a killed command to notice and end, before a folder counts as in use"""

_LOOK_EVERY_S = 0.1


@contextlib.contextmanager
def run_lock(run_dir: Path, option: str = "run.dir") -> Iterator[None]:
    """Hold the run's folder for this process; the kernel lets go of it when the process ends."""
    with (run_dir / ".lock").open("a+") as file:
        left_s = _ENDING_S
        while not _takes(file):
            file.seek(0)
            holder = file.read().strip()
            if left_s <= 0 or not _is_gone(holder):
                raise InputError(
                    f"{option}={run_dir}: another run (process {holder or 'unknown'}) is using it; "
                    f"wait for it, or choose another {option}="
                )
            time.sleep(_LOOK_EVERY_S)
            left_s -= _LOOK_EVERY_S
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _takes(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_gone(holder: str) -> bool:
    """Whether a process of this machine has ended; its workers, which share its lock, follow."""
    try:
        os.kill(int(holder), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OverflowError, OSError):
        pass
    return False
