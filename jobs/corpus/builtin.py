"""The sources of text that every installation carries: no network, nothing shipped.

`stdlib` is the Python standard library without its tests, `packages` are the sources of pinned
packages this project installs, `code` is both. A standard-library file is held out when SHA-256 of
its relative path says so, on every machine alike.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath

from jobs.corpus.documents import Documents, joined
from sparsify.data.split import is_held_out, shuffled
from sparsify.errors import InputError

BUILT_IN = ("stdlib", "packages", "code")

HELD_OUT_SHARE = 0.05

SPLIT_BY_NAME = ("stdlib", "code")  # held out by file name, whatever else is asked for

PACKAGES = (
    "torch", "transformers", "ray", "deepspeed", "numpy", "pandas", "matplotlib", "sympy",
    "networkx", "wandb",
)  # fmt: skip

_PACKAGE_CAP_BYTES = 16_000_000  # so that no single package dominates the mix

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "site-packages",
    "dist-packages",
}


def _is_source(path: PurePosixPath) -> bool:
    return path.suffix == ".py" and not _SKIPPED_FOLDERS.intersection(path.parts)


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")


def _stdlib_files(held_out: bool) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # Not descended into, only to save time: site-packages may hold more files than the rest.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found.extend(Path(folder, name) for name in names)
    files = []
    for path in sorted(found):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        if _is_source(relative) and is_held_out(str(relative), HELD_OUT_SHARE) == held_out:
            files.append(path)
    return files


def stdlib_documents(held_out: bool) -> Iterator[str]:
    """Sources of the standard library, tests excluded, in the order of their relative paths."""
    return map(_read, _stdlib_files(held_out))


def package_documents() -> Iterator[str]:
    """Sources of the packages in `PACKAGES`, tests excluded, at most 16 MB of each."""
    for name in PACKAGES:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            raise InputError(
                f"data: source 'packages' needs the package {name!r}, which is not installed; "
                "run 'make setup' or use another source"
            ) from None
        paths = sorted((str(f), Path(str(f.locate()))) for f in files if _is_source(f))
        num_bytes = 0
        for index in shuffled(len(paths), seed=0):
            if num_bytes > _PACKAGE_CAP_BYTES:
                break
            text = _read(paths[index][1])
            num_bytes += len(text)
            yield text


def text_digest(text: str) -> bytes:
    """SHA-256 of a document's text: which documents are equal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def builtin_documents(name: str, held_out: bool | None) -> Sequence[str]:
    """The documents of `stdlib`, `packages` or `code`, in an order that is always the same.

    `stdlib` and `code` have a held-out side (files of the standard library) and the rest, which
    None means too. `packages` has no side of its own.
    """
    if name == "packages":
        return list(package_documents())
    stdlib = Documents(_stdlib_files(bool(held_out)), _read)
    if held_out or name == "stdlib":
        return stdlib
    held = {text_digest(text) for text in stdlib_documents(True)}
    return joined([stdlib, [text for text in package_documents() if text_digest(text) not in held]])
