"""How checkpoints store the tensors of a model whose experts are linear layers, and back.

Many families' files hold all experts of a layer as one tensor of three dimensions, the projections
transposed or their rows interleaved, where the model has a linear layer for each expert and
projection (`models.experts`). Nobody but this file knows how the one is made of the other; what
reads and writes files asks it, one stored tensor at a time.

Shape suffixes: E experts, O and I rows and columns of a linear layer, R the rows of all projections
that one tensor holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_stored_layout"


@dataclass(frozen=True)
class Fused:
    """A stored tensor that holds a weight, or a bias, of all experts of a layer.

    It is (E, R, I), transposed (E, I, R), of biases (E, R); or a matrix of experts one below the
    other, (E R, I).
    """

    name: str
    """in the files"""
    parts: tuple[tuple[str, ...], ...]
    """for each expert the model's names of what the tensor holds, in the order of the rows"""
    is_transposed: bool = False
    is_interleaved: bool = False
    """rows of the projections take turns, in place of one projection after another"""
    num_rows: int | None = None
    """of an expert in a matrix of all; None where there is a dimension for them"""

    def of_expert(self, whole: Any, expert: int) -> Tensor:
        """An expert's slice of the tensor, or of a file's, of which no more is read."""
        rows = slice(expert * (self.num_rows or 0), (expert + 1) * (self.num_rows or 0))
        found: Tensor = whole[expert if self.num_rows is None else rows]
        return found

    def part(self, of_expert: Tensor, number: int) -> Tensor:
        """One projection's rows, (O, I) or (O,), in an expert's slice; a view."""
        rows = of_expert.mT if self.is_transposed else of_expert
        count = len(self.parts[0])
        return rows[number::count] if self.is_interleaved else rows.chunk(count)[number]

    def part_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What `part` gives of a tensor of this shape; () of one that cannot be such a tensor."""
        of_expert = shape[1:] if self.num_rows is None else (self.num_rows, *shape[1:])
        if not of_expert or shape[0] != len(self.parts) * (self.num_rows or 1):
            return ()
        rows, *columns = reversed(of_expert) if self.is_transposed else of_expert
        count = len(self.parts[0])
        return () if rows % count else (rows // count, *columns)

    def whole(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor.

        Args:
            tensors: all its parts.

        Cost: a copy of them.
        """
        first = tensors[self.parts[0][0]]
        size = [len(self.parts[0]) * len(first), *first.shape[1:]]
        size = size[::-1] if self.is_transposed else size
        count = len(self.parts)
        found = first.new_empty(
            [count, *size] if self.num_rows is None else [count * size[0], *size[1:]]
        )
        for expert, names in enumerate(self.parts):
            for number, name in enumerate(names):
                self.part(self.of_expert(found, expert), number).copy_(tensors[name])
        return found


@dataclass(frozen=True)
class Slice:
    """Where a part is in a fused tensor."""

    fused: Fused
    expert: int
    number: int
    """of the part among the expert's"""

    def of(self, whole: Any) -> Tensor:
        """The part of a tensor, or of a file's; a view."""
        return self.fused.part(self.fused.of_expert(whole, self.expert), self.number)


@dataclass(frozen=True)
class Layout:
    """What of a model is stored otherwise than its state dict has it."""

    fused: Mapping[str, Fused] = field(default_factory=dict)
    """stored name -> what it holds"""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """model's name -> stored name, of tensors that are stored as they are"""

    @cached_property
    def _of_part(self) -> dict[str, Fused]:
        return {part: f for f in self.fused.values() for names in f.parts for part in names}

    @cached_property
    def _own(self) -> dict[str, str]:
        return {stored: own for own, stored in self.renamed.items()}

    def slices(self, name: str) -> dict[str, Slice | None]:
        """The model's names of what a stored tensor holds, and where; None for all of it."""
        fused = self.fused.get(name)
        if fused is None:
            return {self._own.get(name, name): None}
        return {
            part: Slice(fused, expert, number)
            for expert, parts in enumerate(fused.parts)
            for number, part in enumerate(parts)
        }

    def separated(self, stored: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Stored tensors as the model has them; views of the same memory."""
        for stored_name, tensor in stored:
            for name, at in self.slices(stored_name).items():
                yield name, tensor if at is None else at.of(tensor)

    def joined(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A model's tensors as they are stored; parts are held until the last one has come."""
        held: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            fused = self._of_part.get(name)
            if fused is None:
                yield self.renamed.get(name, name), tensor
                continue
            parts = held.setdefault(fused.name, {})
            parts[name] = tensor
            if len(parts) == sum(map(len, fused.parts)):
                yield fused.name, fused.whole(held.pop(fused.name))
        assert not held, f"an expert of {min(held)} is missing"


def layout_of(model: Any) -> Layout:
    """How a model's tensors are stored by its family; nothing is said of most models."""
    found: Layout = getattr(model, _ATTRIBUTE, Layout())
    return found


def set_layout(model: torch.nn.Module, layout: Layout) -> None:
    """Have `layout_of` give this."""
    setattr(model, _ATTRIBUTE, layout)
