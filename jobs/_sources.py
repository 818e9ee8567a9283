"""Where text comes from: files, folders, datasets, and the sources every installation carries.

Built-in sources (no network, nothing shipped): `stdlib` is the Python standard library without its
tests, `packages` are the sources of pinned packages this project installs, `code` is both. A
standard-library file is held out when SHA-256 of its relative path says so, on every machine alike.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import torch

from jobs._textfiles import (
    Documents,
    existing_path,
    joined,
    load_hub_dataset,
    read_source,
    source_files,
)
from sparsify.errors import CalibrationError, InputError
from sparsify.text import is_held_out, shuffled, split_documents, token_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from conf.schema import DataConfig

Which = Literal["calibration", "train", "heldout"]

BUILT_IN = ("stdlib", "packages", "code")
HELD_OUT_SHARE = 0.05
_SPLIT_BY_NAME = ("stdlib", "code")  # held out by file name, whatever else is asked for
_MIN_DOCUMENTS = 20  # fewer are split by `split_documents` at the end of every document
_LEAST_CALIBRATION_SHARE = 0.25  # of the rows asked for; less gives statistics not worth using
_ASKED_BY = {
    "calibration": "samples (num_samples)",
    "train": "tokens (distill.num_tokens)",
    "heldout": "tokens (evaluate.num_tokens)",
}
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


def _text_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _code_documents(held_out: bool) -> Sequence[str]:
    """Standard library and packages; held out are files of the standard library alone."""
    if held_out:
        return Documents(_stdlib_files(True), _read)
    held = {_text_digest(text) for text in stdlib_documents(True)}
    packages = [text for text in package_documents() if _text_digest(text) not in held]
    return joined([Documents(_stdlib_files(False), _read), packages])


def open_source(
    name: str, held_out: bool | None, config: DataConfig, order_seed: int | None = None
) -> Iterator[str]:
    """The documents of a source, or of one side of its split; empty documents are left out.

    Args:
        name: `stdlib`, `packages`, `code`, or what `jobs._textfiles.read_source` reads.
        held_out: True for the held-out part, False for the rest, None for all of it. `stdlib` and
            `code` are split by file name; every other source by the document's text
            (`sparsify.text.split_documents`, share `config.heldout_share`). For `stdlib` and
            `code`, None also means the rest: what those hold out stays held out.
        config: names the text field, the separator and the held-out share.
        order_seed: order the documents by this seed; None keeps the order of the source.

    Raises:
        InputError: the source cannot be read (now), or a document in it (when it is reached).
    """
    documents: Sequence[str]
    text_rule = held_out
    if name in _SPLIT_BY_NAME:
        text_rule = None
        side = bool(held_out)
        documents = (
            Documents(_stdlib_files(side), _read) if name == "stdlib" else _code_documents(side)
        )
    elif name == "packages":
        documents = list(package_documents())
    else:
        documents = read_source(name, config.text_field, config.separator, BUILT_IN)
    if text_rule is not None and len(documents) < _MIN_DOCUMENTS:
        documents = split_documents(list(documents), text_rule, config.heldout_share)
        text_rule = None
    order = range(len(documents)) if order_seed is None else shuffled(len(documents), order_seed)
    texts = (documents[i] for i in order)
    if text_rule is None:
        return (text for text in texts if text)
    share = config.heldout_share
    return (text for text in texts if text and is_held_out(text, share) == text_rule)


def _source(config: DataConfig, which: Which) -> tuple[str, bool | None]:
    """(name, held_out) for `open_source` of what the configuration means by `which`."""
    if which == "heldout":
        if config.heldout is None:
            return config.calibration, True
        if config.heldout in _SPLIT_BY_NAME:
            return config.heldout, True
        for field in ("calibration", "train"):
            other = getattr(config, field)
            if other is not None and _same_source(other, config.heldout):
                raise InputError(
                    f"data.heldout={config.heldout}: the same source as data.{field}, so the "
                    "score would be on text the model has seen; leave data.heldout empty (null) "
                    "to hold a part of it out, or give another source"
                )
        return config.heldout, None
    name = config.calibration if which == "calibration" or config.train is None else config.train
    # With held-out text given, nothing of this source needs to be kept back.
    return name, None if config.heldout is not None else False


def _same_source(first: str, second: str) -> bool:
    named = {*BUILT_IN, *(n for n in (first, second) if n.startswith("hf:"))}
    if first in named or second in named:
        return first == second
    return Path(first).resolve() == Path(second).resolve()


def load_rows(
    config: DataConfig,
    which: Which,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    seed: int,
) -> tuple[torch.Tensor, str | None]:
    """Token rows for one use of the data.

    Calibration and training take the documents in an order shuffled by `seed`; held-out documents
    come in one shuffled order that is always the same, so that a part of them stands for all.
    Documents are read and tokenised only as far as they are needed.
    A training source that is too short is repeated, in a new order every time, each pass packed by
    itself. A document equal to a held-out one is never used for calibration or training.

    Args:
        config: the sources and `sequence_length`.
        which: calibration, train or heldout.
        tokenizer: of the model that will read the rows.
        num_rows: rows wanted.
        seed: orders the documents.

    Returns:
        int64 tensor of shape (rows, sequence_length), and a warning for the user when the source
        was too short for what was asked, else None. Training has always `num_rows` rows; the
        others may have fewer.

    Raises:
        CalibrationError: calibration text for less than a quarter of the rows.
        InputError: not one row of text for the other uses, or the source cannot be read.
    """
    name, held_out = _source(config, which)
    length = config.sequence_length
    documents = partial(_documents, config, which)
    if which == "heldout":
        order = _order_seed(which, 0, 0)  # not the run's seed: scores of runs stay comparable
        texts = open_source(name, held_out, config, order)
        rows = token_rows(texts, tokenizer, length, num_rows)
    else:
        rows = token_rows(documents(_order_seed(which, seed, 0)), tokenizer, length, num_rows)
    if len(rows) == num_rows:
        return rows, None
    what = f"data.{which}={name}" if getattr(config, which) else f"data.calibration={name}"
    part = {
        True: "the held-out part has",
        False: "the part not held out has",
        None: "it has",
    }
    least = num_rows * _LEAST_CALIBRATION_SHARE if which == "calibration" else 1
    if len(rows) < max(1, least):
        texts = documents(None) if which != "heldout" else open_source(name, held_out, config)
        num_tokens = token_rows(texts, tokenizer, 2).numel()  # exact up to an odd last token
        kind = CalibrationError if which == "calibration" else InputError
        raise kind(
            f"{what}: {part[held_out]} {num_tokens} tokens; {num_rows} rows of {length} need "
            f"{num_rows * length}, and at least {max(1, round(least)) * length} are required; give "
            f"more text, a shorter data.sequence_length, or ask for fewer {_ASKED_BY[which]}"
        )
    has = f"{what}: {part[held_out]} {len(rows)} rows of {length} tokens, {num_rows} were asked for"
    if which != "train":
        return rows, f"{has}; all of them are used"
    passes = [rows]
    while sum(map(len, passes)) < num_rows:
        missing = num_rows - sum(map(len, passes))
        order = _order_seed(which, seed, len(passes))
        again = token_rows(documents(order), tokenizer, length, missing)
        passes.append(again)
    return torch.cat(passes), f"{has}; the text is used {num_rows / len(rows):.1f} times"


def _documents(config: DataConfig, which: Which, order_seed: int | None) -> Iterator[str]:
    """Documents for calibration or training, without those equal to a held-out one."""
    name, held_out = _source(config, which)
    held_name, held_side = _source(config, "heldout")
    texts = open_source(name, held_out, config, order_seed)
    if name == held_name:
        return texts  # one source, split in two
    held = {_text_digest(text) for text in open_source(held_name, held_side, config)}
    return (text for text in texts if _text_digest(text) not in held)


def _order_seed(which: Which, seed: int, epoch: int) -> int:
    """A seed of its own for every use and pass, so that no two runs share an order by accident."""
    digest = hashlib.sha256(f"{which}:{seed}:{epoch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def source_fingerprint(config: DataConfig, which: Which) -> str:
    """SHA-256 (hex) of the content of a source: changes when, and only when, its text may have.

    A file counts by its bytes; a folder by path, size and hash of each file it is read from; the
    built-in sources by the same of their sources' text; a Hub dataset by its name and the
    fingerprint that `datasets` gives it. Settings that choose a part of the text are not in it.
    """
    name, held_out = _source(config, which)
    if name in BUILT_IN:
        texts = open_source(name, held_out if name in _SPLIT_BY_NAME else None, config)
        return _digest_of(_text_digest(text) for text in texts)
    if name.startswith("hf:"):
        fingerprint = load_hub_dataset(name)._fingerprint
        return _digest_of([name.encode(), fingerprint.encode()])
    path = existing_path(name, BUILT_IN)
    files = source_files(path)
    if path.is_file():
        return _file_digest(path)
    lines = (
        f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0{_file_digest(file)}\n"
        for file in files
    )
    return _digest_of(line.encode() for line in lines)


def _digest_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
