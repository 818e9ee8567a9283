"""Which text a run uses: the documents of a source, its split and its mixes.

Sources are the built-in ones (`jobs.corpus.builtin`), files, folders and datasets
(`jobs.corpus.text_files`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from conf.options.data import DataConfig, parse_mix
from jobs.corpus.builtin import BUILT_IN, SPLIT_BY_NAME, builtin_documents, text_digest
from jobs.corpus.places import HUB, absolute_name, full_name
from jobs.corpus.text_files import read_source
from sparsify.data.split import MIN_DOCUMENTS, shuffled, split_document
from sparsify.errors import InputError

Which = Literal["calibration", "train", "heldout"]


def open_source(
    name: str, held_out: bool | None, config: DataConfig, order_seed: int | None = None
) -> Iterator[str]:
    """The documents of a source, or of one side of its split; empty documents are left out.

    Args:
        name: `stdlib`, `packages`, `code`, or what `jobs.corpus.text_files.read_source` reads.
        held_out: True for the held-out part, False for the rest, None for all of it. `stdlib` and
            `code` are split by file name; every other source by the document's text
            (`sparsify.data.split.split_document`, share `config.heldout_share`). For `stdlib` and
            `code`, None also means the rest: what those hold out stays held out.
        config: names the text field, the separator and the held-out share.
        order_seed: order the documents by this seed; None keeps the order of the source.

    Raises:
        InputError: the source cannot be read (now), or a document in it (when it is reached).
    """
    documents = source_documents(name, held_out, config)
    text_rule = None if name in SPLIT_BY_NAME else held_out
    order = range(len(documents)) if order_seed is None else shuffled(len(documents), order_seed)
    texts = (documents[i] for i in order)
    if text_rule is not None:
        share, has_few = config.heldout_share, len(documents) < MIN_DOCUMENTS
        texts = (split_document(text, text_rule, share, has_few) for text in texts)
    return (text for text in texts if text)


def source_documents(name: str, held_out: bool | None, config: DataConfig) -> Sequence[str]:
    """All documents of a source; of a built-in one, those of its side `held_out`."""
    if name in BUILT_IN:
        return builtin_documents(name, held_out)
    return read_source(name, config.text_field, config.separator, BUILT_IN)


def uses_mix(config: DataConfig, which: Which) -> bool:
    """Whether the rows of this use come from several sources."""
    return bool(config.mix) and (
        which == "calibration" or (which == "train" and config.train is None)
    )


def source_of(config: DataConfig, which: Which) -> tuple[str, bool | None]:
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
    return name, rest_of(config)


def _read_sources(config: DataConfig) -> list[tuple[str, str]]:
    """(field, source) of everything that calibration and training read."""
    if config.mix:
        found = [("mix", name) for _, name in parse_mix("data.mix", config.mix)]
    else:
        found = [("calibration", config.calibration)]
    return found + ([("train", config.train)] if config.train is not None else [])


def rest_of(config: DataConfig) -> bool | None:
    """`held_out` of sources for calibration and training."""
    # With held-out text given, nothing of these sources needs to be kept back.
    return None if config.heldout is not None else False


def _same_source(first: str, second: str) -> bool:
    first, second = (full_name(name, BUILT_IN) for name in (first, second))
    if any(name in BUILT_IN or name.startswith(HUB) for name in (first, second)):
        return first == second
    return Path(first).resolve() == Path(second).resolve()


def source_label(name: str) -> str:
    """A source's name without where it lies."""
    is_path = name not in BUILT_IN and not name.startswith(HUB)
    return Path(name).name if is_path else name


def training_sources(config: DataConfig) -> list[tuple[float, str, bool | None]]:
    """(share, source, `held_out` for `open_source`) of everything that training reads."""
    if not uses_mix(config, "train"):
        return [(1.0, *source_of(config, "train"))]
    return [(share, name, rest_of(config)) for share, name in parse_mix("data.mix", config.mix)]


def gives_heldout(config: DataConfig, name: str) -> bool:
    """Whether held-out text comes from the source itself: then the split keeps them apart."""
    return name == source_of(config, "heldout")[0]


def heldout_digests(config: DataConfig) -> set[bytes]:
    """`text_digest` of every held-out document: those that training must not use."""
    return {text_digest(text) for text in open_source(*source_of(config, "heldout"), config)}


def with_absolute_paths(config: DataConfig) -> DataConfig:
    """`config` with files and folders named from the root: workers may run elsewhere."""

    def absolute(name: str | None) -> str | None:
        return None if name is None else absolute_name(name, BUILT_IN)

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
