"""Which weights may survive: N:M and unstructured patterns, keep masks, and the exact checker.

A keep mask is a boolean tensor of a weight's shape; True = survives, everywhere in this package.
Shape suffixes: O output features (rows), I input features (columns), G groups of a row, M columns
of a group. Knows tensors only, not models or methods.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.errors import InputError, PatternViolationError

_FORMS = "write N:M such as 2:4, or unstructured:S with 0 < S < 1 such as unstructured:0.5"
_MAX_GROUP = 256


@dataclass(frozen=True)
class Pattern:
    """N:M keeps n of every m consecutive input columns of each row; unstructured has n = m = 0."""

    n: int
    m: int
    sparsity: float
    """share of zeros: 1 - n/m, or what was asked for"""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4", "4:8", "1:2" or "unstructured:0.5".

        Raises:
            InputError: any other text, or numbers that prune nothing or everything.
        """
        if not isinstance(text, str):
            raise InputError(
                f"pattern: got {text!r} instead of text (YAML reads a bare 2:4 as a number); "
                'put it in quotes: "2:4"'
            )
        if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
            n, m = int(match[1]), int(match[2])
            if not 1 <= n < m <= _MAX_GROUP:
                raise InputError(f"pattern {text!r}: N:M needs 1 <= N < M <= {_MAX_GROUP}")
            return cls(n, m, 1 - n / m)
        if match := re.fullmatch(r"unstructured:(\d*\.?\d+(?:[eE]-?\d+)?)", text.strip()):
            sparsity = float(match[1])
            if not 0 < sparsity < 1:
                raise InputError(f"pattern {text!r}: the share of zeros must be between 0 and 1")
            return cls(0, 0, sparsity)
        raise InputError(f"pattern {text!r}: not a pattern; {_FORMS}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.is_structured else f"unstructured:{self.sparsity!r}"

    @property
    def is_structured(self) -> bool:
        """True for N:M, False for unstructured."""
        return self.m > 0

    def num_kept(self, num_columns: int) -> int:
        """Weights that survive in the first `num_columns` columns of a row (halves round up).

        For N:M, `num_columns` must be a multiple of m.
        """
        if self.is_structured:
            return num_columns // self.m * self.n
        return math.floor((1 - self.sparsity) * num_columns + 0.5)


def check_divides(name: str, in_features: int, pattern: Pattern) -> None:
    """Refuse a layer whose rows cannot be cut into whole groups.

    Raises:
        InputError: m does not divide `in_features`; the message names the layer `name`.
    """
    if pattern.is_structured and in_features % pattern.m:
        raise InputError(
            f"{name}: {in_features} input columns cannot be cut into groups of {pattern.m} for "
            f"pattern {pattern}; leave the layer dense with prune.skip or use another pattern"
        )


def keep_mask_from_scores(scores_OI: Tensor, pattern: Pattern) -> Tensor:
    """Keep the highest scores of every group (N:M) or of every row (unstructured).

    Args:
        scores_OI: (O, I) real tensor, higher = more worth keeping. Of equal scores the one with
            the lower column survives.
        pattern: for unstructured, every row keeps `pattern.num_kept(I)` weights.

    Returns:
        bool tensor (O, I), True = survives.

    Raises:
        InputError: m does not divide I.

    Cost: N:M O(O I m) comparisons without sorting; unstructured one stable sort per row.
    """
    num_rows, num_columns = scores_OI.shape
    if not pattern.is_structured:
        return keep_top(scores_OI, pattern.num_kept(num_columns))
    check_divides("scores", num_columns, pattern)
    scores_OGM = scores_OI.reshape(num_rows, num_columns // pattern.m, pattern.m)
    keep = torch.stack(keep_highest(scores_OGM.unbind(-1), pattern.n), dim=-1)
    return keep.reshape(num_rows, num_columns)


def keep_highest(scores: Iterable[Tensor], num_kept: int) -> list[Tensor]:
    """Of tensors of equal shape, which `num_kept` are the highest, position by position.

    A score survives when fewer than `num_kept` of the others beat it; of two equal scores the
    earlier one wins. Comparing the few members of a group costs less than sorting them, and the
    answer does not depend on a sort's treatment of ties.
    """
    members = list(scores)
    beaten_by = [torch.zeros(members[0].shape, dtype=torch.int16, device=members[0].device)
                 for _ in members]  # fmt: skip
    for first in range(len(members)):
        for second in range(first + 1, len(members)):
            second_wins = members[second] > members[first]
            beaten_by[first] += second_wins
            beaten_by[second] += ~second_wins
    return [count < num_kept for count in beaten_by]


def keep_top(scores_OI: Tensor, num_kept: int) -> Tensor:
    """The `num_kept` highest scores of each row; of equal scores the lower column survives."""
    order = scores_OI.argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros(scores_OI.shape, dtype=torch.bool, device=scores_OI.device)
    return keep.scatter_(1, order[:, :num_kept], True)


def _too_full(weight_OI: Tensor, pattern: Pattern) -> Tensor:
    """bool (O, G): groups (whole rows for unstructured) with more nonzeros than allowed."""
    num_rows, num_columns = weight_OI.shape
    nonzero = weight_OI != 0
    if not pattern.is_structured:
        return nonzero.sum(1, keepdim=True) > pattern.num_kept(num_columns)
    check_divides("weight", num_columns, pattern)
    grouped = nonzero.reshape(num_rows, num_columns // pattern.m, pattern.m)
    return grouped.sum(-1, dtype=torch.int16) > pattern.n


def find_violation(weight_OI: Tensor, pattern: Pattern) -> tuple[int, int] | None:
    """(row, first column) of the first group, in reading order, with too many nonzeros, or None.

    NaN counts as nonzero. For unstructured the group is the whole row, so the column is 0.
    """
    places = _too_full(weight_OI, pattern).nonzero()
    if not len(places):
        return None
    row, group = places[0].tolist()
    return row, group * pattern.m


def count_violations(weight_OI: Tensor, pattern: Pattern) -> int:
    """Number of groups (rows for unstructured) with more nonzeros than the pattern allows."""
    return int(_too_full(weight_OI, pattern).sum())


def require_pattern(weights: Iterable[tuple[str, Tensor]], pattern: Pattern) -> None:
    """Stop at the first weight that breaks the pattern.

    Args:
        weights: (layer name, weight of shape (O, I)) pairs.
        pattern: what each must satisfy exactly.

    Raises:
        PatternViolationError: names the layer, row, columns and the number of nonzeros found.
    """
    for name, weight_OI in weights:
        place = find_violation(weight_OI, pattern)
        if place is None:
            continue
        row, column = place
        width = pattern.m or weight_OI.shape[1]
        found = int((weight_OI[row, column : column + width] != 0).sum())
        raise PatternViolationError(
            f"{name}: row {row}, columns {column} to {column + width - 1} hold {found} nonzero "
            f"weights where pattern {pattern} allows {pattern.num_kept(width)}; the pruned zeros "
            "were lost after pruning, prune this model again"
        )
