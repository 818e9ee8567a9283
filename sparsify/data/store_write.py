"""Writing a token store: one shard at a time, in any order and by any process, then the manifest.

The format is described in `sparsify.data.store`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.data import shards
from sparsify.data.rows import TokenRows, token_stream, tokenizer_digest, vocabulary_size
from sparsify.data.store import (
    FORMAT,
    ID_TYPES,
    SHARD_PREFIX,
    VERSION,
    Shard,
    StoreSource,
    id_type,
)
from sparsify.errors import InputError
from sparsify.files import file_sha256
from sparsify.tensors import write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def shard_name(source: int, index: int) -> str:
    """File name of shard `index` of source `source`."""
    return f"{SHARD_PREFIX}{source:02}-{index:05}.safetensors"


def write_shard(
    folder: Path,
    name: str,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
) -> Shard:
    """Tokenise documents, pack them into rows and write those as one file, whole or not at all.

    The rows are those of `sparsify.data.rows.token_rows`. The same documents and tokenizer give the
    same bytes. A shard whose text is shorter than one row has no rows.

    Cost: 8 bytes of memory per token on top of the documents.
    """
    stream = token_stream(documents, tokenizer)
    ids = np.frombuffer(stream.ids, dtype=np.int64)
    num_rows, num_dropped = divmod(len(ids), sequence_length)
    num_tokens = num_rows * sequence_length
    is_start = np.zeros(num_tokens, dtype=bool)
    starts = np.frombuffer(stream.starts, dtype=np.int64)
    is_start[starts[starts < num_tokens]] = True
    shape = (num_rows, sequence_length)
    ids_NT, is_start_NT = ids[:num_tokens].reshape(shape), is_start.reshape(shape)
    return _write(folder / name, ids_NT, is_start_NT, tokenizer, len(starts), num_dropped)


def write_rows(
    folder: Path,
    rows_of: Mapping[str, TokenRows],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
) -> None:
    """A whole store of rows that are there already: one source of one shard for each name.

    A row's first token counts as the start of a document. Answers are marked in all rows or none.
    """
    folder.mkdir(exist_ok=True)
    has_answers = {rows.is_answer_NT is not None for rows in rows_of.values()} == {True}
    sources = []
    for index, (name, rows) in enumerate(rows_of.items()):
        is_start_NT = rows.positions_NT.numpy() == 0
        path, num_documents = folder / shard_name(index, 0), int(is_start_NT.sum())
        answers = rows.is_answer_NT.numpy() if rows.is_answer_NT is not None else None
        shard = _write(path, rows.ids_NT.numpy(), is_start_NT, tokenizer, num_documents, 0, answers)
        sources.append(StoreSource(name, 1.0, shard.sha256, (shard,)))
    write_manifest(folder, tokenizer, sequence_length, sources, {}, has_answers=has_answers)


def _write(
    path: Path, ids_NT: NDArray[np.int64], is_start_NT: NDArray[np.bool_],
    tokenizer: PreTrainedTokenizerBase, num_documents: int, num_dropped: int,
    is_answer_NT: NDArray[np.bool_] | None = None,
) -> Shard:  # fmt: skip
    ids_type = ID_TYPES[id_type(vocabulary_size(tokenizer))][1]
    tensors = {"ids": torch.from_numpy(ids_NT.astype(ids_type))}
    for name, bits_NT in (("starts", is_start_NT), ("trained", is_answer_NT)):
        if bits_NT is not None:
            packed_NB = np.packbits(bits_NT, axis=1, bitorder="little")
            tensors[name] = torch.from_numpy(packed_NB)
    write_tensors(path, tensors, {"format": FORMAT})
    return Shard(
        path.name, len(ids_NT), ids_NT.size, num_documents, num_dropped, path.stat().st_size,
        file_sha256(path),
    )  # fmt: skip


def write_manifest(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    sources: Sequence[StoreSource],
    settings: Mapping[str, Any],
    warnings: Sequence[str] = (),
    has_answers: bool = False,
) -> None:
    """Make a folder of shards a store.

    Args:
        folder: where the shards are.
        tokenizer: the one that made them.
        sequence_length: tokens of a row.
        sources: with their shards, in the order in which rows are numbered.
        settings: plain values that say how it was made; part of the digest, so no paths.
        warnings: what of the sources is left out or replaced, likewise.
        has_answers: whether the shards mark the tokens that are to be learned.

    Raises:
        InputError: a source has no rows.
    """
    for source in sources:
        if source.num_rows == 0:
            raise InputError(
                f"{source.name}: not one row of {sequence_length} tokens in it; give more text or "
                "a shorter data.sequence_length"
            )
    vocab_size = vocabulary_size(tokenizer)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "sequence_length": sequence_length,
        "vocab_size": vocab_size,
        "ids": id_type(vocab_size),
        "splits_documents": True,
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "sources": [
            {**asdict(source), "num_rows": source.num_rows, "num_tokens": source.num_tokens}
            for source in sources
        ],
        "settings": dict(settings),
    }
    if has_answers:
        manifest["has_answers"] = True
    if warnings:  # a store of whole text keeps the digest that it had before there were any
        manifest["warnings"] = list(warnings)
    shards.write_manifest(folder, manifest)
