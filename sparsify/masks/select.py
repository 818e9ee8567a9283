"""Keep masks from scores, and the exact check of a pattern."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsify.errors import PatternViolationError
from sparsify.pattern import Pattern, check_divides


def keep_mask_from_scores(scores_OI: Tensor, pattern: Pattern) -> Tensor:
    """Keep the highest scores of every group (N:M) or of every row (unstructured).

    Args:
        scores_OI: (O, I) real tensor, or a stack of them (E, O, I), higher = more worth keeping. Of
            equal scores the one with the lower column survives.
        pattern: for unstructured, every row keeps `pattern.num_kept(I)` weights.

    Returns:
        bool tensor of the same shape, True = survives.

    Raises:
        InputError: m does not divide I.

    Cost: N:M O(O I m) comparisons without sorting; unstructured one stable sort per row.
    """
    num_columns = scores_OI.shape[-1]
    if not pattern.is_structured:
        return keep_top(scores_OI, pattern.num_kept(num_columns))
    check_divides("scores", num_columns, pattern)
    scores_OGM = scores_OI.unflatten(-1, (num_columns // pattern.m, pattern.m))
    return torch.stack(keep_highest(scores_OGM.unbind(-1), pattern.n), dim=-1).flatten(-2)


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
    order = scores_OI.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros(scores_OI.shape, dtype=torch.bool, device=scores_OI.device)
    return keep.scatter_(-1, order[..., :num_kept], True)


def find_violation(weight_OI: Tensor, pattern: Pattern) -> tuple[int, int] | None:
    """(row, first column) of the first group, in reading order, with too many nonzeros, or None.

    NaN counts as nonzero. An unstructured pattern is the share of a layer: its rows may share the
    nonzeros unevenly, as those of other programs do. Where the layer has too many, the group is
    the first row that has, and the column is 0.
    """
    num_rows, num_columns = weight_OI.shape
    if pattern.is_structured:
        check_divides("weight", num_columns, pattern)
    elif int(weight_OI.count_nonzero()) <= pattern.most_kept(num_rows, num_columns):
        return None
    width = pattern.m or num_columns
    grouped = (weight_OI != 0).reshape(num_rows, num_columns // width, width)
    places = (grouped.sum(-1) > pattern.num_kept(width)).nonzero()
    if not len(places):
        return None
    row, group = places[0].tolist()
    return row, group * width


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
