"""From documents to fixed-length token rows, and the rule that says which documents are held out.

Owns tokenisation and packing. Knows nothing of where documents come from: an iterable of strings
goes in, an integer tensor comes out, and the same strings give the same tensor on any machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from sparsify.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_DOCUMENTS = 64
_BATCH_CHARS = 256_000  # so that one long book does not make a reader of one row wait
_TAIL_SHARE = 0.1  # held-out share of a text that has too few documents to hold some out


def is_held_out(key: str, share: float) -> bool:
    """Whether the document named or spelled `key` belongs to the held-out split.

    The first four bytes of the key's SHA-256, read as a fraction, are compared with `share`:
    the answer depends on the key alone, never on the machine, the order or the other documents.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def split_documents(documents: list[str], held_out: bool, share: float) -> list[str]:
    """The held-out (or the other) part of `documents`, by `is_held_out` on each document's text.

    A text of fewer than 20 documents has too few to hold some out: there the last tenth of the
    characters of every document is the held-out part.
    """
    if len(documents) >= 20:
        return [text for text in documents if is_held_out(text, share) == held_out]
    parts = []
    for text in documents:
        cut = int(len(text) * (1 - _TAIL_SHARE))
        parts.append(text[cut:] if held_out else text[:cut])
    return [text for text in parts if text]


def _encoded(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each document with one mark between documents.

    The mark is the beginning token where the tokenizer sets one itself, else the end-of-text
    token: both together make pairs that no model has seen in training.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    batch: list[str] = []
    num_chars = 0

    def flush() -> Iterator[list[int]]:
        for ids in tokenizer(batch, verbose=False)["input_ids"] if batch else []:
            is_begun = begin is not None and ids[:1] == [begin]
            has_mark = end is None or is_begun or ids[-1:] == [end]
            yield ids if has_mark or not ids else [*ids, end]

    for text in documents:
        batch.append(text)
        num_chars += len(text)
        if len(batch) == _BATCH_DOCUMENTS or num_chars > _BATCH_CHARS:
            yield from flush()
            batch, num_chars = [], 0
    yield from flush()


def token_rows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_rows: int | None = None,
) -> torch.Tensor:
    """Pack documents one after another into rows of `sequence_length` tokens, without padding.

    Args:
        documents: texts in the order in which they are to be used; consumed only as far as needed.
        tokenizer: its end-of-text token is put after every document, unless it has none or starts
            documents with a beginning token itself.
        sequence_length: tokens per row.
        num_rows: stop after this many rows; None takes every whole row there is.

    Returns:
        int64 tensor of shape (rows, sequence_length); the unfinished last row is dropped, so the
        tensor is empty when the documents hold fewer tokens than one row.
    """
    if sequence_length < 2:
        raise InputError(f"sequence_length: {sequence_length} is too short; use at least 2 tokens")
    wanted = None if num_rows is None else num_rows * sequence_length
    stream: list[int] = []
    for ids in _encoded(documents, tokenizer):
        stream.extend(ids)
        if wanted is not None and len(stream) >= wanted:
            break
    rows = len(stream) // sequence_length
    if num_rows is not None:
        rows = min(rows, num_rows)
    flat = torch.tensor(stream[: rows * sequence_length], dtype=torch.int64)
    return flat.reshape(rows, sequence_length)


def shuffled(num_items: int, seed: int) -> list[int]:
    """A permutation of range(num_items) that depends on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_items, generator=generator).tolist()
