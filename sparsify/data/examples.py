"""Examples of a conversation's tokens, packed whole into rows of one length.

Shape suffixes: N rows, T tokens of a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.data.rows import TokenRows
from sparsify.errors import InputError


@dataclass(frozen=True)
class Example:
    """One conversation."""

    ids_T: NDArray[np.int64]
    """token ids"""
    is_answer_T: NDArray[np.bool_]
    """of each token, whether it is to be learned"""

    @property
    def num_answers(self) -> int:
        """Tokens that are predicted from those before them, and learned."""
        return int(self.is_answer_T[1:].sum())


def pack(
    examples: Sequence[Example], sequence_length: int, filler: int, together: bool = True
) -> TokenRows:
    """Rows of whole examples, each a document of its own; what is left of a row is filled up.

    An example goes into the fullest row that has room for it, longest first (best fit decreasing):
    rows stay full, and the same examples give the same rows.

    Args:
        examples: each of at most `sequence_length` tokens, with an answer in it.
        sequence_length: tokens per row.
        filler: token id of what fills a row up, a document that is not learned.
        together: False gives each example a row of its own.

    Raises:
        InputError: no examples.

    Cost: O(E log E) for E examples, and 17 bytes a token of the rows.
    """
    if not examples:
        raise InputError("no examples to train on; give records with answers that fit into a row")
    rows = _placed([len(one.ids_T) for one in examples], sequence_length, together)
    shape = len(rows), sequence_length
    ids_NT = torch.full(shape, filler, dtype=torch.int64)
    positions_NT = torch.zeros(shape, dtype=torch.int64)
    is_answer_NT = torch.zeros(shape, dtype=torch.bool)
    for row, members in enumerate(rows):
        end = 0
        for index in members:
            begin, end = end, end + len(examples[index].ids_T)
            ids_NT[row, begin:end] = torch.from_numpy(examples[index].ids_T)
            positions_NT[row, begin:end] = torch.arange(end - begin)
            is_answer_NT[row, begin:end] = torch.from_numpy(examples[index].is_answer_T)
            is_answer_NT[row, begin] = False  # nothing before it that it could be predicted from
        positions_NT[row, end:] = torch.arange(sequence_length - end)
    return TokenRows(ids_NT, positions_NT, is_answer_NT=is_answer_NT)


def _placed(lengths: Sequence[int], room: int, together: bool) -> list[list[int]]:
    """Which examples each row holds."""
    if not together:
        return [[index] for index in range(len(lengths))]
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert length <= room, "whoever calls leaves out what is longer than a row"
        place = bisect_left(left, (length, -1))
        if place == len(left):
            rows.append([index])
            insort(left, (room - length, len(rows) - 1))
        else:
            free, row = left.pop(place)
            rows[row].append(index)
            insort(left, (free - length, row))
    return rows
