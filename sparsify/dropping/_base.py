"""What a rule is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.models.blocks import Blocks

PARTS = ("layers", "attention", "mlp")
"""what can be dropped: whole layers, or one of the two sublayers of a layer"""


@dataclass(frozen=True, order=True)
class Unit:
    """Something that can be dropped."""

    layer: int
    """from 0"""
    part: str = "layers"
    """one of `PARTS`"""

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.part == "layers" else f"{self.part} of {self.layer}"


@dataclass
class Task:
    """A model, and how much of it is to go."""

    num_layers: int
    """that the model has"""
    num_dropped: int
    """units to drop"""
    open: Callable[[], Blocks]
    """the model's blocks; called by rules that run the model"""
    rows: TokenRows | None = None
    """this process's calibration rows; None for a rule that needs none"""
    comm: Comm = field(default_factory=Comm.single)
    parts: Sequence[str] = ("layers",)
    """candidates, some of `PARTS`"""
    batch_size: int = 8
    """rows per forward"""
    device: str = "cpu"
    """where the model is"""
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None
    """of a model's logits (B, T, V) from the full model's, the mean over their tokens"""
    state: Path | None = None
    """JSON file in which a rule keeps what it has done so far; None: it starts over"""
    on_step: Callable[[int, int, str], None] = lambda done, total, what: None
    """told how much of the work is done, of how much, and what is counted"""


@dataclass(frozen=True)
class Choice:
    """What is to be dropped, and why."""

    units: tuple[Unit, ...]
    figures: dict[str, Any] = field(default_factory=dict)
    """what the rule measured: plain values, for the record"""


@dataclass(frozen=True)
class Rule:
    """A way to choose; its module exports it as RULE."""

    name: str
    summary: str
    choose: Callable[[Task], Choice]
    needs_rows: bool = True
    """whether it runs the model"""
    parts: Sequence[str] = ("layers",)
    """what it can choose from"""
