"""Which documents are held out, and orders that depend on a seed alone."""

from __future__ import annotations

import hashlib

import torch

MIN_DOCUMENTS = 20
"""a text of fewer has too few to hold some out"""

_TAIL_SHARE = 0.1  # held-out share of such a text


def is_held_out(key: str, share: float) -> bool:
    """Whether the document named or spelled `key` belongs to the held-out split.

    The first four bytes of the key's SHA-256, read as a fraction, are compared with `share`:
    the answer depends on the key alone, never on the machine, the order or the other documents.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def split_documents(documents: list[str], held_out: bool, share: float) -> list[str]:
    """The held-out (or the other) part of `documents`, by `is_held_out` on each document's text.

    Of a text of fewer than MIN_DOCUMENTS the last tenth of the characters of every document is the
    held-out part.
    """
    if len(documents) >= MIN_DOCUMENTS:
        return [text for text in documents if is_held_out(text, share) == held_out]
    parts = []
    for text in documents:
        cut = int(len(text) * (1 - _TAIL_SHARE))
        parts.append(text[cut:] if held_out else text[:cut])
    return [text for text in parts if text]


def shuffled(num_items: int, seed: int) -> list[int]:
    """A permutation of range(num_items) that depends on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_items, generator=generator).tolist()
