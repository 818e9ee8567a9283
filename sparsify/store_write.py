"""Writing a token store: shards one by one, in any order and by any process, then the manifest.

The format is described in `sparsify.store`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsify.errors import InputError
from sparsify.files import write_json, write_tensors
from sparsify.store import (
    FORMAT,
    ID_TYPES,
    MANIFEST,
    SHARD_PREFIX,
    VERSION,
    Shard,
    StoreSource,
    file_sha256,
    id_type,
    manifest_digest,
)
from sparsify.text import token_stream, tokenizer_digest, vocabulary_size

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

    The rows are those of `sparsify.text.token_rows`. The same documents and tokenizer give the same
    bytes. A shard whose text is shorter than one row has no rows.

    Cost: 8 bytes of memory per token on top of the documents.
    """
    ids_type = ID_TYPES[id_type(vocabulary_size(tokenizer))][1]
    stream = token_stream(documents, tokenizer)
    ids = np.frombuffer(stream.ids, dtype=np.int64)
    num_rows, num_dropped = divmod(len(ids), sequence_length)
    num_tokens = num_rows * sequence_length
    is_start = np.zeros(num_tokens, dtype=bool)
    starts = np.frombuffer(stream.starts, dtype=np.int64)
    is_start[starts[starts < num_tokens]] = True
    shape = (num_rows, sequence_length)
    ids_NT = ids[:num_tokens].reshape(shape).astype(ids_type)
    starts_NB = np.packbits(is_start.reshape(shape), axis=1, bitorder="little")
    tensors = {"ids": torch.from_numpy(ids_NT), "starts": torch.from_numpy(starts_NB)}
    path = folder / name
    write_tensors(path, tensors, {"format": FORMAT})
    return Shard(
        name, num_rows, num_tokens, len(starts), num_dropped, path.stat().st_size, file_sha256(path)
    )


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether the shard's file is there with the size and the hash that were written."""
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.num_bytes:
        return False
    return file_sha256(path) == shard.sha256


def write_manifest(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    sources: Sequence[StoreSource],
    settings: Mapping[str, Any],
) -> None:
    """Make a folder of shards a store.

    Args:
        folder: where the shards are.
        tokenizer: the one that made them.
        sequence_length: tokens of a row.
        sources: with their shards, in the order in which rows are numbered.
        settings: plain values that say how it was made; part of the digest, so no paths.

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
    write_json(folder / MANIFEST, {**manifest, "digest": manifest_digest(manifest)})
