"""Options data.*: text for calibration, recovery and evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.errors import InputError
from sparsify.params import as_list, check_options, option


def parse_mix(field: str, entries: Sequence[str]) -> list[tuple[float, str]]:
    """(share, source) of every entry `WEIGHT SOURCE`; the shares are weights over their sum."""
    mix: list[tuple[float, str]] = []
    for entry in entries:
        weight, _, source = entry.strip().partition(" ")
        source = source.strip()
        where = f"{field}={as_list(entries)}: entry '{entry}'"
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not source or not math.isfinite(value) or value <= 0:
            raise InputError(
                f"{where}: must be a weight over 0, a space and a source; write it like "
                f"'{field}=[0.7 stdlib,0.3 books.txt]'"
            )
        if source in (known for _, known in mix):
            raise InputError(f"{where}: names {source} a second time; add up its weights")
        mix.append((value, source))
    total = sum(weight for weight, _ in mix)
    return [(weight / total, source) for weight, source in mix]


@dataclass
class DataConfig:
    """Text for calibration, recovery and evaluation."""

    calibration: str = "stdlib"
    """calibration source: stdlib, packages, code, a text or JSONL file, a folder, or a dataset"""
    mix: list[str] = option([])
    """sources with their weights, such as [0.7 stdlib,0.3 a.txt], instead of data.calibration"""
    train: str | None = None
    """source of recovery text; null = the calibration source or mix"""
    heldout: str | None = None
    """source of evaluation text; null = the held-out part of data.calibration"""
    text_field: str = "text"
    """field of a JSONL line or dataset row that holds the text"""
    separator: str = option("<|endoftext|>", blank=True)
    """text between two documents of a plain text file"""
    heldout_share: float = option(0.05, above=0, high=0.5)
    """share of the documents held out from calibration and training; over 0, at most 0.5"""
    sequence_length: int = option(256, low=8)
    """tokens per row, in every stage; at least 8"""
    isolate_documents: bool = True
    """documents joined into one row do not attend to each other; positions restart"""

    def __post_init__(self) -> None:
        check_options(self, "data")
        parse_mix("data.mix", self.mix)
        if not self.separator:
            raise InputError("data.separator: is empty; give the text between two documents")
