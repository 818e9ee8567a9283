"""Which documents are held out, and orders that depend on a seed alone."""

from __future__ import annotations

import hashlib

import torch

MIN_DOCUMENTS = 20
"""a text of fewer has too few to hold some out"""

LONG_BYTES = 8 << 20
"""a document of so many is not held out as a whole"""

_TAIL_SHARE = 0.1  # held-out share of such a text


def is_held_out(key: str, share: float) -> bool:
    """Whether the document named or spelled `key` belongs to the held-out split.

    The first four bytes of the key's SHA-256, read as a fraction, are compared with `share`:
    the answer depends on the key alone, never on the machine, the order or the other documents.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def is_long(text: str) -> bool:
    """Whether a document has 8 MiB or more, too much to be held out or kept as a whole."""
    # Counted in bytes when it may be so: no character has more than four.
    return 4 * len(text) >= LONG_BYTES and len(text.encode("utf-8", "surrogatepass")) >= LONG_BYTES


def split_document(text: str, held_out: bool, share: float, has_few: bool) -> str:
    """What of a document is held out (or is not): all of it or nothing, by `is_held_out`.

    Where there are but few documents, and of a long one, the last tenth of its characters is held
    out.
    """
    if not has_few and not is_long(text):
        return text if is_held_out(text, share) == held_out else ""
    cut = int(len(text) * (1 - _TAIL_SHARE))
    return text[cut:] if held_out else text[:cut]


def shuffled(num_items: int, seed: int) -> list[int]:
    """A permutation of range(num_items) that depends on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_items, generator=generator).tolist()
