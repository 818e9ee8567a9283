"""A look at every document of a source: what decides results, and what is left out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from conf.options.data import DataConfig, parse_mix
from jobs.corpus.builtin import BUILT_IN, SPLIT_BY_NAME, text_digest
from jobs.corpus.documents import Documents
from jobs.corpus.places import HUB, existing_path, full_name, source_files
from jobs.corpus.sources import (
    Which,
    rest_of,
    source_documents,
    source_of,
    uses_mix,
    with_absolute_paths,
)
from jobs.corpus.text_files import is_dataset


@dataclass(frozen=True)
class Survey:
    """What a source holds."""

    fingerprint: str
    """SHA-256 (hex) of its documents, in their order"""
    remarks: list[str]
    """what is left out or replaced, a line for each kind"""


def survey_source(config: DataConfig, name: str, held_out: bool | None) -> Survey:
    """Look at every document of a source, for `held_out` as in `open_source`.

    The fingerprint changes when, and only when, the text does: neither with the files' names and
    format, nor with rows that hold no text. Settings that choose a part of the text are not in it.

    Raises:
        InputError: the source, or a document in it, cannot be read.

    Cost: reads and decodes all of it, in the memory of one document.
    """
    documents = source_documents(name, held_out if name in SPLIT_BY_NAME else None, config)
    fingerprint = _digest_of(text_digest(text) for text in documents if text)
    remarks = documents.remarks.lines() if isinstance(documents, Documents) else []
    return Survey(fingerprint, remarks)


class Texts:
    """The sources of a run: each is looked through once, and again when its files have changed."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._found: dict[tuple[str, bool | None], tuple[Any, Survey]] = {}

    def fingerprint(self, which: Which) -> str:
        """What decides a result that is made of this use of the data.

        A mix counts by its sources and, where they are not given, by the held-out documents that it
        must not use.
        """
        found = [self._survey(name, held).fingerprint for _, name, held in self._sources(which)]
        if not uses_mix(self._config, which):
            return found[0]
        if self._config.heldout is None:
            found.append(self.fingerprint("heldout"))
        return _digest_of(part.encode() for part in found)

    def absolute_config(self) -> DataConfig:
        """The sources by paths that other processes and folders find too."""
        return with_absolute_paths(self._config)

    def remarks(self, which: Which) -> list[str]:
        """What is left out of the sources of this use, a line for each source and kind."""
        return [
            f"data.{field}={name}: {line}"
            for field, name, held in self._sources(which)
            for line in self._survey(name, held).remarks
        ]

    def _sources(self, which: Which) -> list[tuple[str, str, bool | None]]:
        """(field, source, held out) of a use."""
        config = self._config
        if uses_mix(config, which):
            names = [name for _, name in parse_mix("data.mix", config.mix)]
            return [("mix", name, rest_of(config)) for name in names]
        field = "calibration" if getattr(config, which) is None else which
        return [(field, *source_of(config, which))]

    def _survey(self, name: str, held_out: bool | None) -> Survey:
        key = name, held_out if name in SPLIT_BY_NAME else None
        state = source_state(name)
        if key not in self._found or self._found[key][0] != state:
            self._found[key] = state, survey_source(self._config, name, held_out)
        return self._found[key][1]


def source_fingerprint(config: DataConfig, which: Which) -> str:
    """`Texts.fingerprint`, once."""
    return Texts(config).fingerprint(which)


def source_state(name: str) -> Any:
    """Sizes and times of a source's files: what tells that they have been written to.

    Raises:
        InputError: there are none.
    """
    name = full_name(name, BUILT_IN)
    if name in BUILT_IN or name.startswith(HUB) or is_dataset(name):
        return None
    files = source_files(existing_path(name, BUILT_IN))
    return [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _digest_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
