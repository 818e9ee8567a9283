"""GPUs by name: memory, rates and links, from `cards.json`, which names the sources."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparsify.errors import InputError
from sparsify.params import close_match

_GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One GPU; rates are its maker's, for dense products with float32 sums."""

    key: str
    """as it is named in options"""
    name: str
    """as people call it"""
    words: tuple[str, ...]
    """of the device's name in CUDA"""
    memory_gib: float
    """what CUDA reports as its memory, of which a process may take nearly all; GiB. Less than the
    name says: ECC and the driver take a part"""
    bandwidth: float
    """of its memory, bytes/s"""
    flops: dict[str, float]
    """bf16, fp8, fp32, int8 -> operations/s; what it has not is left out"""
    link: float
    """to the other GPUs of its machine, bytes/s in one direction"""
    gpus_per_node: int
    """of the usual machine"""
    network: float
    """share of its machine's network, bytes/s in one direction: a 400 Gb/s adapter for each of
    Hopper and Blackwell, 200 Gb/s for Ampere and Ada, 25 Gb/s at a desk. No fact of the card"""
    source: str
    """address of the maker's data sheet"""

    @property
    def memory_bytes(self) -> float:
        """What CUDA reports, in bytes."""
        return self.memory_gib * _GIB


@cache
def cards() -> dict[str, Card]:
    """Every GPU that is known, by its key."""
    found = json.loads(Path(__file__).with_name("cards.json").read_text(encoding="utf-8"))
    return {
        key: Card(key=key, **{**facts, "words": tuple(facts["words"])})
        for key, facts in found.items()
    }


def find_card(key: str, field: str) -> Card:
    """The GPU of that name.

    Args:
        key: its name.
        field: the option that has it, for the message.

    Raises:
        InputError: it is not known.
    """
    known = cards()
    if key not in known:
        raise InputError(
            f"{field}={key}: no GPU of that name{close_match(key, list(known))}; there are: "
            f"{', '.join(known)}"
        )
    return known[key]
