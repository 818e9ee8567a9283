"""What the name of a source means: a path, a data set of the Hub, the files of a folder."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jobs.corpus.documents import LEFT_OUT, Remarks
from sparsify.errors import InputError

HUB = "hf:"
"""begins the name of a data set of the Hub"""

TEXT_SUFFIXES = (".txt", ".md", ".py")

_RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

_PACKED_WHOLE = (".parquet", ".arrow")  # have a compression of their own

FORMATS = (
    f"{' '.join(TEXT_SUFFIXES + _RECORD_SUFFIXES)} (all but {' '.join(_PACKED_WHOLE)} also with "
    f"{' '.join(COMPRESSIONS)} after it)"
)

_ABOUT = re.compile(r"(readme|licen[sc]e|copying|notice)([._-][a-z]{2,10})?\.(md|txt)", re.I)

_ABOUT_NAMES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

_HUB_NAME = re.compile(r"[a-z0-9][\w.-]*(/[a-z0-9][\w.-]*)?(:[\w.-]+)?(@.+)?", re.I)

_FILE_NAME = re.compile(r"\.[a-z]{2,7}$", re.I)


def unreadable(path: Path, error: Exception) -> InputError:
    """The error of a file or folder that cannot be opened or read."""
    return InputError(
        f"data source {path}: cannot be read ({error}); check the file and its permissions"
    )


def full_name(name: str, known: Sequence[str]) -> str:
    """A source's name with all that may be left out: a home folder for ~, hf: before a Hub name.

    A name is one of the Hub if it could be one, and no file, folder or known source has it or
    nearly has it.
    """
    if name in known or name.startswith(HUB):
        return name
    path, split = split_suffix(name)
    if _exists(path):
        return f"{path}@{split}" if split else str(path)
    spec = name.partition("@")[0]
    is_local = "/" in spec and path.parent.is_dir()
    could_be = _HUB_NAME.fullmatch(name) and not _FILE_NAME.search(spec) and not is_local
    return f"{HUB}{name}" if could_be and not _close(path, known) else str(path)


def absolute_name(name: str, known: Sequence[str]) -> str:
    """`full_name`, of a file or folder from the root; its @SPLIT stays."""
    name = full_name(name, known)
    if name in known or name.startswith(HUB):
        return name
    path, split = split_suffix(name)
    return f"{path.absolute()}@{split}" if split else str(path.absolute())


def existing_path(name: str, known: Sequence[str]) -> Path:
    """The file or folder that a source name (not `hf:`) means, without `@SPLIT`.

    Raises:
        InputError: there is none; suggests names from the folder and from `known`.
    """
    path = split_suffix(name)[0]
    if not _exists(path):
        raise InputError(f"data source {name}: {_missing(path, known)}")
    return path


def split_suffix(name: str) -> tuple[Path, str | None]:
    """Path and split of `FOLDER@SPLIT`; the split is None where that is a path itself."""
    path, at, split = name.rpartition("@")
    whole = Path(name).expanduser()
    if at and not _exists(whole) and is_saved_dataset(Path(path).expanduser()):
        return Path(path).expanduser(), split
    return whole, None


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` saved the folder."""
    return _exists(path / "dataset_dict.json") or all(
        _exists(path / name) for name in ("dataset_info.json", "state.json")
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise unreadable(path, error) from None


def _close(path: Path, known: Sequence[str]) -> list[str]:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if os.access(folder, os.R_OK | os.X_OK) else []
    close = [str(folder / n) for n in difflib.get_close_matches(path.name, names, 3, 0.6)]
    return difflib.get_close_matches(str(path), known, 1, 0.6) + close


def _missing(path: Path, known: Sequence[str]) -> str:
    hub = f" (a data set of the Hub: {HUB}{path})" if _HUB_NAME.fullmatch(str(path)) else ""
    if close := _close(path, known):
        return f"there is no such file or folder; close to it: {', '.join(close)}{hub}"
    where = "" if path.parent.is_dir() else f" (nor the folder {path.parent})"
    return f"there is no such file or folder{where}; give a path or one of {', '.join(known)}{hub}"


def kind_of(path: Path) -> tuple[str | None, str | None]:
    """(format suffix, compression suffix) of a file name; format None when it cannot be read."""
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    kind = suffixes[-1] if suffixes else None
    if kind not in TEXT_SUFFIXES + _RECORD_SUFFIXES or (compression and kind in _PACKED_WHOLE):
        return None, compression
    return (".jsonl" if kind == ".ndjson" else kind), compression


def source_files(path: Path, remarks: Remarks | None = None) -> list[Path]:
    """The files that make up a file or folder source, in the order of their paths.

    Of a folder, all files in a format that is read, in folders inside and behind links too; not
    those that are hidden or say what the data is, such as README.md.

    Args:
        path: the source.
        remarks: told what is left out.

    Raises:
        InputError: nothing to read in it, a folder in it that cannot be read, or a link to nothing.
    """
    if path.is_file():
        return [path]
    remarks = remarks or Remarks()
    kept: list[Path] = []
    left: list[str] = []
    for file, why in sorted(_walk(path)):
        if why is None and not file.exists():
            raise InputError(
                f"data source {path}: {file.relative_to(path)} is a link to nothing "
                f"({os.readlink(file)}); bring its file back or remove the link"
            )
        why = why or _why_not(file)
        if why is None:
            kept.append(file)
            continue
        remarks.add(LEFT_OUT, f"{file.relative_to(path)}: {why}")
        left += [] if why == "hidden" else [file.name]
    if not kept:
        found = ", ".join(left[:3]) or "no files"
        raise InputError(f"data source {path}: a folder with {found}; expected {FORMATS}")
    return kept


def _walk(path: Path) -> list[tuple[Path, str | None]]:
    """Every file below a folder, and the folders that are not looked into with the reason."""

    def fail(error: OSError) -> None:
        raise unreadable(Path(error.filename or path), error)

    found: list[tuple[Path, str | None]] = []
    seen: set[tuple[int, int]] = set()
    for folder, inner, names in os.walk(path, onerror=fail, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            found.append((Path(folder), "read already, behind another link"))
            inner.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        found += [(Path(folder, name), "hidden") for name in inner if name.startswith(".")]
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found += [(Path(folder, name), None) for name in names]
    return found


def _why_not(file: Path) -> str | None:
    """Why a file of a folder is not read; None if it is."""
    if file.name.startswith("."):
        return "hidden"
    if _ABOUT.fullmatch(file.name) or file.name in _ABOUT_NAMES:
        return "about the data"
    return "not a format that is read" if kind_of(file)[0] is None else None
