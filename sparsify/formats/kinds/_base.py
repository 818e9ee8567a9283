"""What a format is, and what it is given to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.formats.source import Source
from sparsify.pattern import Pattern


@dataclass(frozen=True)
class Export:
    """A sparse model to be exported."""

    source: Source
    masks: Mapping[str, Tensor]
    """layer name -> keep mask (O, I), read when it is asked for"""
    pattern: Pattern
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    """where folders are made"""
    shard_bytes: int
    """a weight file holds at most so much, or one tensor"""
    quantized: Path | None = None
    """packed folder of the quantised model, where there is one"""


@dataclass(frozen=True)
class Written:
    """A folder that a format wrote, read back and checked."""

    name: str
    """of the folder"""
    what: str
    """what it holds, a sentence for its model card"""
    load: str
    """Python that loads it"""
    gate: dict[str, int]
    """counts of the check: `formats.verify`"""
    num_bytes: int
    """of its weight files"""
    is_quantized: bool = False


@dataclass(frozen=True)
class Format:
    """A format."""

    name: str
    """as `export.formats` has it"""
    summary: str
    write: Callable[[Export], list[Written]]
    """Writes the folders of this format below `Export.folder`: weights whole, index last, read
    back and compared to the bit."""


def weight_bytes(folder: Path) -> int:
    """Size of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def sentence(pattern: Pattern, how: str) -> str:
    """For a model card."""
    return f"{pattern} sparse weights, {how}"


def transformers_call(name: str, first: Any = None) -> str:
    """Python that loads a folder in transformers, with an import of ours before it if need be."""
    lines = [] if first is None else [f"{first}  # lets transformers read packed weights"]
    return "\n".join(
        ["from transformers import AutoModelForCausalLM", *lines, "",
         f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")']
    )  # fmt: skip
