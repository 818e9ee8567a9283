"""Which text a run uses: the documents of a source, its split, mixes, and rows made of them.

Sources are the built-in ones (`jobs._builtin`), files, folders and datasets (`jobs._textfiles`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from conf.rules import parse_mix
from jobs._builtin import BUILT_IN, SPLIT_BY_NAME, builtin_documents, text_digest
from jobs._textfiles import existing_path, load_hub_dataset, read_source, source_files
from sparsify.crops import crop_rows
from sparsify.errors import CalibrationError, InputError
from sparsify.files import file_sha256
from sparsify.order import largest_remainder
from sparsify.text import TokenRows, is_held_out, shuffled, split_documents, token_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from conf.schema import DataConfig

Which = Literal["calibration", "train", "heldout"]

_MIN_DOCUMENTS = 20  # fewer are split by `split_documents` at the end of every document
_LEAST_CALIBRATION_SHARE = 0.25  # of the rows asked for; less gives statistics not worth using
_ASKED_BY = {
    "calibration": "samples (num_samples)",
    "train": "tokens (distill.num_tokens)",
    "heldout": "tokens (evaluate.num_tokens)",
}


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
    if name in BUILT_IN:
        documents = builtin_documents(name, held_out)
        text_rule = None if name in SPLIT_BY_NAME else held_out
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


def _uses_mix(config: DataConfig, which: Which) -> bool:
    """Whether the rows of this use come from several sources."""
    return bool(config.mix) and (
        which == "calibration" or (which == "train" and config.train is None)
    )


def _source(config: DataConfig, which: Which) -> tuple[str, bool | None]:
    """(name, held_out) for `open_source` of what the configuration means by `which`; no mixes."""
    if which == "heldout":
        if config.heldout is None:
            return config.calibration, True
        if config.heldout in SPLIT_BY_NAME:
            return config.heldout, True
        for field, other in _read_sources(config):
            if _same_source(other, config.heldout):
                raise InputError(
                    f"data.heldout={config.heldout}: the same source as data.{field}, so the "
                    "score would be on text the model has seen; leave data.heldout empty (null) "
                    "to hold a part of it out, or give another source"
                )
        return config.heldout, None
    name = config.calibration if which == "calibration" or config.train is None else config.train
    return name, _rest_of(config)


def _read_sources(config: DataConfig) -> list[tuple[str, str]]:
    """(field, source) of everything that calibration and training read."""
    if config.mix:
        found = [("mix", name) for _, name in parse_mix("data.mix", config.mix)]
    else:
        found = [("calibration", config.calibration)]
    return found + ([("train", config.train)] if config.train is not None else [])


def _rest_of(config: DataConfig) -> bool | None:
    """`held_out` of sources for calibration and training."""
    # With held-out text given, nothing of these sources needs to be kept back.
    return None if config.heldout is not None else False


def _same_source(first: str, second: str) -> bool:
    named = {*BUILT_IN, *(n for n in (first, second) if n.startswith("hf:"))}
    if first in named or second in named:
        return first == second
    return Path(first).resolve() == Path(second).resolve()


def source_label(name: str) -> str:
    """A source's name without where it lies."""
    is_path = name not in BUILT_IN and not name.startswith("hf:")
    return Path(name).name if is_path else name


def training_sources(config: DataConfig) -> list[tuple[float, str, bool | None]]:
    """(share, source, `held_out` for `open_source`) of everything that training reads."""
    if not _uses_mix(config, "train"):
        return [(1.0, *_source(config, "train"))]
    return [(share, name, _rest_of(config)) for share, name in parse_mix("data.mix", config.mix)]


def gives_heldout(config: DataConfig, name: str) -> bool:
    """Whether held-out text comes from the source itself: then the split keeps them apart."""
    return name == _source(config, "heldout")[0]


def heldout_digests(config: DataConfig) -> set[bytes]:
    """`text_digest` of every held-out document: those that training must not use."""
    return {text_digest(text) for text in open_source(*_source(config, "heldout"), config)}


def with_absolute_paths(config: DataConfig) -> DataConfig:
    """`config` with files and folders named from the root: workers may stand elsewhere."""

    def absolute(name: str | None) -> str | None:
        if name is None or name in BUILT_IN or not Path(name).exists():
            return name
        return str(Path(name).absolute())

    def of_entry(entry: str) -> str:
        weight, _, source = entry.strip().partition(" ")
        return f"{weight} {absolute(source.strip())}"

    return replace(
        config,
        calibration=absolute(config.calibration) or "",
        mix=[of_entry(entry) for entry in config.mix],
        train=absolute(config.train),
        heldout=absolute(config.heldout),
    )


def load_rows(
    config: DataConfig,
    which: Which,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    seed: int,
) -> tuple[TokenRows, str | None]:
    """Token rows for one use of the data.

    Calibration and training take the documents in an order shuffled by `seed`; held-out documents
    come in one shuffled order that is always the same, so that a part of them stands for all.
    Calibration takes its rows from all over the text (`sparsify.crops`), or, where a source has
    less than about twice the text that it needs, from the beginning. Documents are read and
    tokenised only as far as they are needed.
    A training source that is too short is repeated, in a new order every time, each pass packed by
    itself. A document equal to a held-out one is never used for calibration or training.
    A mix gives rows of each of its sources in proportion to the weights, in an order that depends
    on `seed` and has the same proportions all along. No row holds text of two sources.

    Args:
        config: the sources, `sequence_length` and `isolate_documents`.
        which: calibration, train or heldout.
        tokenizer: of the model that will read the rows.
        num_rows: rows wanted.
        seed: orders the documents.

    Returns:
        The rows, and a warning for the user when a source was too short for what was asked, else
        None. Training and mixes have always `num_rows` rows; the others may have fewer.

    Raises:
        CalibrationError: calibration text for less than a quarter of the rows; of a mix, for less
            than all rows of a source.
        InputError: not one row of text for the other uses, a source of a mix that gets no row, or
            a source that cannot be read.
    """
    reader = _Reader(config, which, tokenizer, seed)
    if _uses_mix(config, which):
        rows, warning = _mixed_rows(reader, num_rows)
    else:
        name, held_out = _source(config, which)
        field = "calibration" if getattr(config, which) is None else which
        rows, warning = reader.rows(field, name, held_out, num_rows)
    return (rows if config.isolate_documents else TokenRows.whole(rows.ids_NT)), warning


def _mixed_rows(reader: _Reader, num_rows: int) -> tuple[TokenRows, str | None]:
    """Rows of every source of the mix, interleaved."""
    config = reader.config
    mix = parse_mix("data.mix", config.mix)
    counts = largest_remainder([share for share, _ in mix], num_rows)
    parts, warnings = [], []
    for (share, name), count in zip(mix, counts, strict=True):
        if count == 0:
            raise InputError(
                f"data.mix={name}: its share of {num_rows} rows is {share * num_rows:.2g} rows; "
                f"ask for more {_ASKED_BY[reader.which]}, raise its weight or leave it out"
            )
        rows, warning = reader.rows("mix", name, _rest_of(config), count)
        parts.append(rows)
        warnings += [warning] if warning else []
    order = _interleaved(counts, _order_seed(reader.which, reader.seed, 0))
    return TokenRows.joined(parts)[order], "; ".join(warnings) or None


def _interleaved(counts: Sequence[int], seed: int) -> torch.Tensor:
    """An order of sum(counts) rows in which every stretch holds about its share of each part.

    Row j of a part of n stands at a random place of the j-th of n equal stretches, not in its
    middle: with regular places and two workers, one might get all the rows of one source.
    """
    generator = torch.Generator().manual_seed(seed)
    places = [
        (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
        for count in counts
    ]
    return torch.cat(places).argsort(stable=True)


class _Reader:
    """Rows out of one source after another, for one use of the data."""

    def __init__(
        self, config: DataConfig, which: Which, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> None:
        self.config = config
        self.which = which
        self.seed = seed
        self._tokenizer = tokenizer

    def rows(
        self, field: str, name: str, held_out: bool | None, num_rows: int
    ) -> tuple[TokenRows, str | None]:
        """`num_rows` rows of the source `name`, which stands in data.`field`; see `load_rows`."""
        rows = self._pass(name, held_out, num_rows, 0)
        if len(rows) == num_rows:
            return rows, None
        length = self.config.sequence_length
        part = {
            True: "the held-out part has",
            False: "the part not held out has",
            None: "it has",
        }[held_out]
        least = 1
        if self.which == "calibration":
            share = 1 if field == "mix" else _LEAST_CALIBRATION_SHARE
            least = max(1, math.ceil(num_rows * share))
        if len(rows) < least:
            texts = self._documents(name, held_out, None)
            num_tokens = token_rows(texts, self._tokenizer, 2).num_tokens  # up to an odd last one
            kind = CalibrationError if self.which == "calibration" else InputError
            raise kind(
                f"data.{field}={name}: {part} {num_tokens} tokens; {num_rows} rows of {length} "
                f"need {num_rows * length}, and at least {least * length} are required; give more "
                "text, a shorter data.sequence_length, or ask for fewer "
                f"{_ASKED_BY[self.which]}"
            )
        has = (
            f"data.{field}={name}: {part} {len(rows)} rows of {length} tokens, {num_rows} were "
            "asked for"
        )
        if self.which != "train":
            return rows, f"{has}; all of them are used"
        passes = [rows]
        while (missing := num_rows - sum(map(len, passes))) > 0:
            passes.append(self._pass(name, held_out, missing, len(passes)))
        times = num_rows / len(rows)
        return TokenRows.joined(passes), f"{has}; the text is used {times:.1f} times"

    def _pass(self, name: str, held_out: bool | None, num_rows: int, epoch: int) -> TokenRows:
        # Not the run's seed for held-out text: scores of runs with different seeds are comparable.
        seed = _order_seed(self.which, 0 if self.which == "heldout" else self.seed, epoch)
        length = self.config.sequence_length

        def texts() -> Iterator[str]:
            return self._documents(name, held_out, seed)

        rows = None
        if self.which == "calibration":
            rows = crop_rows(texts(), self._tokenizer, length, num_rows, seed)
        if rows is None:
            rows = token_rows(texts(), self._tokenizer, length, num_rows)
        return rows

    def _documents(self, name: str, held_out: bool | None, order_seed: int | None) -> Iterator[str]:
        """The documents; for calibration and training without those equal to a held-out one."""
        texts = open_source(name, held_out, self.config, order_seed)
        if self.which == "heldout" or gives_heldout(self.config, name):
            return texts
        return (text for text in texts if text_digest(text) not in self._held)

    @cached_property
    def _held(self) -> set[bytes]:
        return heldout_digests(self.config)


def _order_seed(which: Which, seed: int, epoch: int) -> int:
    """A seed of its own for every use and pass, so that no two runs share an order by accident."""
    digest = hashlib.sha256(f"{which}:{seed}:{epoch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def source_fingerprint(config: DataConfig, which: Which) -> str:
    """SHA-256 (hex) of the content of a source: changes when, and only when, its text may have.

    A file counts by its bytes; a folder by path, size and hash of each file it is read from; the
    built-in sources by the same of their sources' text; a Hub dataset by its name and the
    fingerprint that `datasets` gives it. Settings that choose a part of the text are not in it.
    A mix counts by its sources and, where they are not given, by the held-out documents that it
    must not use.
    """
    if not _uses_mix(config, which):
        return content_fingerprint(config, *_source(config, which))
    names = [name for _, name in parse_mix("data.mix", config.mix)]
    parts = [content_fingerprint(config, name, _rest_of(config)) for name in names]
    if config.heldout is None:
        parts.append(source_fingerprint(config, "heldout"))
    return _digest_of(part.encode() for part in parts)


def content_fingerprint(config: DataConfig, name: str, held_out: bool | None) -> str:
    """`source_fingerprint` of one source, for `held_out` as in `open_source`."""
    if name in BUILT_IN:
        texts = open_source(name, held_out if name in SPLIT_BY_NAME else None, config)
        return _digest_of(text_digest(text) for text in texts)
    if name.startswith("hf:"):
        fingerprint = load_hub_dataset(name)._fingerprint
        return _digest_of([name.encode(), fingerprint.encode()])
    path = existing_path(name, BUILT_IN)
    files = source_files(path)
    if path.is_file():
        return file_sha256(path)
    lines = (
        f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0{file_sha256(file)}\n"
        for file in files
    )
    return _digest_of(line.encode() for line in lines)


def _digest_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
