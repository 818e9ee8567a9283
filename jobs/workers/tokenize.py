"""Writing a token store shard by shard, and continuing where an earlier run stopped.

How the sources are cut into shards depends on them and on `tokenize.shard_bytes` alone, and every
shard on its part of the text alone: any number of workers and of interruptions gives the same
bytes. Beside the shards, `.tokenize/` holds a record of each one that is whole; it goes when the
manifest is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cluster.runtime.worker import WorkerContext
from conf.options.data import DataConfig
from conf.options.tokenize import TokenizeJobConfig
from jobs.corpus.builtin import BUILT_IN, SPLIT_BY_NAME, text_digest
from jobs.corpus.file_parts import Part, cut_source, read_part
from jobs.corpus.sources import (
    gives_heldout,
    heldout_digests,
    source_label,
    training_sources,
    with_absolute_paths,
)
from jobs.corpus.survey import Survey, source_fingerprint, survey_source
from jobs.runs.display import Display
from jobs.runs.hub import model_folder
from jobs.workers.shards import MapShards, ShardFolder, fill_folder, write_record
from sparsify.data.rows import tokenizer_digest
from sparsify.data.split import MIN_DOCUMENTS, split_document
from sparsify.data.store import Shard, StoreSource, TokenStore, is_store
from sparsify.data.store_write import shard_name, write_manifest, write_shard
from sparsify.errors import InputError
from sparsify.files import written_whole
from sparsify.formats.sparse_folder import model_name
from sparsify.models.load import load_tokenizer, read_tokenizer

STATE = ".tokenize"

_HELD = "heldout.bin"

_DIGEST_BYTES = 32

_DROPPED_SHARE = 0.01  # of a source's tokens, above which a warning is due


@dataclass(frozen=True)
class _Source:
    """A training source, as it is tokenised."""

    name: str
    weight: float
    side: bool | None
    """of a built-in source that is split by the names of its files"""
    rule: str
    """which documents are left out: none, hash (held out by their text) or tail (their ends)"""
    is_filtered: bool
    """whether documents equal to a held-out one are left out"""
    survey: Survey
    shards: list[list[Part]]

    @property
    def label(self) -> str:
        """Its name without where it lies."""
        return source_label(self.name)


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to make one shard."""

    folder: Path
    file: str
    model: Path
    """folder with the tokenizer"""
    data: DataConfig
    parts: list[Part]
    side: bool | None
    rule: str
    heldout: Path | None
    """file of digests of documents to leave out"""


def make_store(config: TokenizeJobConfig) -> Path:
    """Fill the folder that the config names on its cluster; raises as `fill_folder`."""

    def write(out: Path, map_shards: MapShards, display: Display) -> None:
        write_store(config, out, map_shards, display)
        _show(out, display)

    return fill_folder("tokenize", config.tokenize.out, config.cluster, write)


def write_store(
    config: TokenizeJobConfig, out: Path, map_shards: MapShards, display: Display
) -> None:
    """Tokenise what is not yet tokenised, then write the manifest.

    Args:
        config: checked by its rules.
        out: the store's folder; exists.
        map_shards: calls `work(context, payload)` for every payload, wherever.
        display: told what happens.

    Raises:
        InputError: a source or the tokenizer cannot be read, or the folder holds, whole or
            half-way, a store of something else.
    """
    model = model_folder("model.path", config.model.path, fetch=False)
    tokenizer, remark = read_tokenizer(model)
    if remark is not None:
        display.on_event({"kind": "warning", "text": f"model {model_name(model)}: {remark}"})
    data = with_absolute_paths(config.data)
    sources = [
        _open_source(data, *source, config.tokenize.shard_bytes)
        for source in training_sources(data)
    ]
    warnings = [f"{s.label}: {line}" for s in sources for line in s.survey.remarks]
    for text in warnings:
        display.on_event({"kind": "warning", "text": text})
    settings = _settings(config, sources, tokenizer)
    folder = ShardFolder("tokenize", out, out / STATE, "store", settings, Shard, _contents)
    names = [[shard_name(i, j) for j in range(len(s.shards))] for i, s in enumerate(sources)]

    def make(missing: list[str]) -> None:
        if any(source.is_filtered for source in sources):
            _write_digests(folder.state / _HELD, heldout_digests(data))
        tasks = [
            ShardTask(
                out, name, model, data, parts, source.side, source.rule,
                folder.state / _HELD if source.is_filtered else None,
            )
            for source, row in zip(sources, names, strict=True)
            for name, parts in zip(row, source.shards, strict=True)
            if name in missing
        ]  # fmt: skip
        map_shards(tokenize_shard, tasks)

    def finish(shards: dict[str, Shard]) -> None:
        made = [
            _store_source(source, [shards[name] for name in row], display)
            for source, row in zip(sources, names, strict=True)
        ]
        write_manifest(out, tokenizer, config.data.sequence_length, made, settings, warnings)

    folder.complete([name for row in names for name in row], make, finish, display)


def _contents(out: Path) -> tuple[Any, list[dict[str, Any]]]:
    manifest = TokenStore.read_manifest(out)
    return manifest["settings"], [shard for s in manifest["sources"] for shard in s["shards"]]


def _open_source(
    data: DataConfig, weight: float, name: str, held_out: bool | None, shard_bytes: int
) -> _Source:
    """The source with its cuts, its fingerprint, and what of it is held out."""
    if is_store(name):
        raise InputError(f"data source {name}: is a token store already; give the text itself")
    is_by_name = name in SPLIT_BY_NAME
    side = held_out if name in BUILT_IN else None
    shards = cut_source(name, side, data, shard_bytes)
    rule = "none"
    if held_out is not None and not is_by_name:
        rule = "hash" if _has_documents(shards, data, MIN_DOCUMENTS) else "tail"
    return _Source(
        name, weight, side, rule, not gives_heldout(data, name),
        survey_source(data, name, held_out), shards,
    )  # fmt: skip


def _has_documents(shards: list[list[Part]], data: DataConfig, wanted: int) -> bool:
    """Whether there are so many documents, reading no further than to find out."""
    found = 0
    for part in (part for parts in shards for part in parts):
        found += len(read_part(part, None, data))
        if found >= wanted:
            return True
    return False


def _settings(
    config: TokenizeJobConfig, sources: Sequence[_Source], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What decides every byte of the store; plain values without paths."""
    data = config.data
    is_filtered = any(source.is_filtered for source in sources)
    return {
        "sources": {
            source.label if count == 0 else f"{source.label} ({count + 1})": {
                "fingerprint": source.survey.fingerprint,
                "weight": source.weight,
                "held_out": source.rule,
            }
            for source, count in zip(sources, _occurrences(sources), strict=True)
        },
        "heldout": source_fingerprint(data, "heldout") if is_filtered else None,
        "heldout_share": data.heldout_share,
        "text_field": data.text_field,
        "separator": data.separator,
        "sequence_length": data.sequence_length,
        "shard_bytes": config.tokenize.shard_bytes,
        "tokenizer_sha256": tokenizer_digest(tokenizer),
    }


def _occurrences(sources: Sequence[_Source]) -> list[int]:
    """How often each source's label came before: files of two folders may have one name."""
    labels = [source.label for source in sources]
    return [labels[:index].count(label) for index, label in enumerate(labels)]


def tokenize_shard(context: WorkerContext, task: ShardTask) -> dict[str, Any]:
    """Make one shard and the record that says it is whole; the record."""
    # The tokenizer is Rust with threads of its own: as many as the worker was given.
    os.environ.setdefault("RAYON_NUM_THREADS", str(context.num_threads))
    tokenizer = _tokenizer(task.model)
    documents = _shard_documents(task)
    length = task.data.sequence_length
    shard = write_shard(task.folder, task.file, documents, tokenizer, length)
    write_record(task.folder / STATE, shard)
    return asdict(shard)


def _shard_documents(task: ShardTask) -> Iterator[str]:
    """The documents of a shard that are to be trained on, in their order."""
    held = frozenset() if task.heldout is None else _read_digests(task.heldout)
    share = task.data.heldout_share
    for part in task.parts:
        for text in read_part(part, task.side, task.data):
            kept = text
            if task.rule != "none":
                kept = split_document(text, False, share, task.rule == "tail")
            if kept and text_digest(kept) not in held:
                yield kept


_tokenizer = cache(load_tokenizer)


def _write_digests(path: Path, digests: set[bytes]) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(b"".join(sorted(digests)))


@cache
def _read_digests(path: Path) -> frozenset[bytes]:
    content = path.read_bytes()
    size = _DIGEST_BYTES
    return frozenset(content[i : i + size] for i in range(0, len(content), size))


def _store_source(source: _Source, shards: Sequence[Shard], display: Display) -> StoreSource:
    """The source as the manifest has it; warns where much of its text is left out."""
    made = StoreSource(source.label, source.weight, source.survey.fingerprint, tuple(shards))
    dropped = sum(shard.num_dropped_tokens for shard in shards)
    total = dropped + made.num_tokens
    if dropped > _DROPPED_SHARE * total:
        text = (
            f"{source.label}: {dropped:,} of its {total:,} tokens are after the last whole row of "
            "a shard and are left out; with a larger tokenize.shard_bytes there are fewer"
        )
        display.on_event({"kind": "warning", "text": text})
    return made


def _show(out: Path, display: Display) -> None:
    store = TokenStore.open(out)
    display.finish_stage(
        "tokenize", f"{len(store):,} rows, {store.num_tokens:,} tokens, digest {store.digest[:12]}"
    )
    for source in store.sources:
        display.say(
            f"{source.name}: {source.num_rows:,} rows, weight {source.weight:.3g}, "
            f"{sum(shard.num_documents for shard in source.shards):,} documents"
        )
