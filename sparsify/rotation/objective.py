"""How easy matrices are to prune once they are rotated, and its gradient by the rotations.

Derivatives are written out: a matrix is then turned once and its derivative turned back once, and
what autograd would keep of every operation on all scores in between is never made. Everything is
transposed, with a weight's inputs along rows: the members of a group of inputs are then long
vectors, and comparing them costs less. Shape suffixes: D hidden size, O and I rows and columns of a
weight, G groups of a row, H key-value heads, Q query heads of one of them, K width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.masks.select import keep_mask_from_scores
from sparsify.pattern import Pattern

_TINY = 1e-12


class RotationParts:
    """R1, and R2 per attention: rotations or the derivatives by them, views of one buffer."""

    def __init__(self, flat: Tensor, width: int, heads: Sequence[tuple[int, int]]) -> None:
        sizes = [width**2, *(number * size**2 for number, size in heads)]
        parts = flat.split(sizes)
        self.flat = flat
        self.residual_DD = parts[0].view(width, width)
        self.values = [
            part.view(number, size, size)
            for part, (number, size) in zip(parts[1:], heads, strict=True)
        ]
        """(H, K, K) each"""

    @classmethod
    def identity(cls, width: int, heads: Sequence[tuple[int, int]]) -> RotationParts:
        """Of float32 on the CPU."""
        turns = cls(torch.zeros(width**2 + sum(n * k**2 for n, k in heads)), width, heads)
        for matrix in turns.matrices:
            matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return turns

    @property
    def matrices(self) -> list[Tensor]:
        """All of them; R1 is first."""
        return [self.residual_DD, *self.values]

    def over(self, flat: Tensor) -> RotationParts:
        """Views of the same shapes of another buffer."""
        return RotationParts(
            flat, len(self.residual_DD), [value.shape[:2] for value in self.values]
        )


@dataclass(frozen=True)
class Readers:
    """Linears that read one norm: W becomes W R1, and a value projection R2^T W R1.

    The importance of input j is (R1^T M R1)_jj with M the moment of the norm's output.
    """

    linears: list[tuple[nn.Linear, int | None]]
    """with the place of its R2 where it is a value projection"""
    moment_DD: Tensor

    @property
    def num_weights(self) -> int:
        return sum(linear.weight.numel() for linear, _ in self.linears)

    def scores(self, turns: RotationParts) -> Iterator[Tensor]:
        """Importance of the turned weights, (D, O), of one linear after another."""
        importance_D = ((self.moment_DD @ turns.residual_DD) * turns.residual_DD).sum(0)
        for linear, place in self.linears:
            turned_DO = turns.residual_DD.T @ _weight(linear, turns).T
            if place is not None:
                turned_DO = _turn_heads(turned_DO, turns.values[place])
            yield turned_DO.square_().mul_(importance_D.unsqueeze(1))

    def add_gradient(
        self, turns: RotationParts, pattern: Pattern, gradient: RotationParts
    ) -> Tensor:
        """What is minimised, a scalar; its derivatives are added to `gradient`."""
        moved_DD = self.moment_DD @ turns.residual_DD
        importance_D = (moved_DD * turns.residual_DD).sum(0)
        slope_D, loss = torch.zeros_like(importance_D), torch.zeros_like(importance_D[0])
        for linear, place in self.linears:
            weight_OD = _weight(linear, turns)
            before_DO = turned_DO = turns.residual_DD.T @ weight_OD.T
            if place is not None:
                turned_DO = _turn_heads(before_DO, turns.values[place])
            part, slope_DO, by_importance_D = _slopes(turned_DO, importance_D, pattern)
            loss += part
            slope_D += by_importance_D
            if place is not None:
                value_HKK = turns.values[place]
                heads = [x.unflatten(1, value_HKK.shape[:2]) for x in (before_DO, slope_DO)]
                gradient.values[place].add_(torch.einsum("dhk,dhl->hkl", *heads))
                slope_DO = _turn_heads(slope_DO, value_HKK.mT)
            gradient.residual_DD.addmm_(weight_OD.T, slope_DO.T)
        gradient.residual_DD.addcmul_(moved_DD, slope_D, value=2.0)
        return loss


@dataclass(frozen=True)
class Writer:
    """A linear that adds to the stream: W becomes R1^T W; columns that read values also take R2.

    The importance of its inputs is the diagonal of their moment, or where they are values
    (R2^T B R2)_kk with B the moment's block of a query head.
    """

    linear: nn.Linear
    importance_I: Tensor
    place: int | None = None
    """of its R2"""
    blocks_HQKK: Tensor | None = None

    @property
    def num_weights(self) -> int:
        return self.linear.weight.numel()

    def scores(self, turns: RotationParts) -> Iterator[Tensor]:
        """Importance of the turned weights, (I, D)."""
        before_ID = _weight(self.linear, turns).T @ turns.residual_DD
        turned_ID, importance_I, _ = self._turn(before_ID, turns)
        yield turned_ID.square_().mul_(importance_I.unsqueeze(1))

    def add_gradient(
        self, turns: RotationParts, pattern: Pattern, gradient: RotationParts
    ) -> Tensor:
        """What is minimised, a scalar; its derivatives are added to `gradient`."""
        weight_DI = _weight(self.linear, turns)
        before_ID = weight_DI.T @ turns.residual_DD
        turned_ID, importance_I, moved_HQKK = self._turn(before_ID, turns)
        loss, slope_ID, by_importance_I = _slopes(turned_ID, importance_I, pattern)
        if self.place is not None and moved_HQKK is not None:
            num_heads, num_queries, width, _ = moved_HQKK.shape
            shape = (num_heads, num_queries, width)
            heads = [x.unflatten(0, shape) for x in (before_ID, slope_ID)]
            by_value = gradient.values[self.place]
            by_value.add_(torch.einsum("hqkd,hqld->hkl", *heads))
            by_column = by_importance_I.view(num_heads, num_queries, 1, width)
            by_value.add_((moved_HQKK * by_column).sum(1), alpha=2.0)
            value_H1KK = turns.values[self.place].unsqueeze(1)
            slope_ID = (value_H1KK @ heads[1]).flatten(0, 2)
        gradient.residual_DD.addmm_(weight_DI, slope_ID)
        return loss

    def _turn(
        self, before_ID: Tensor, turns: RotationParts
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """R2^T on the rows of every head; its inputs' importance; and B R2."""
        if self.place is None or self.blocks_HQKK is None:
            return before_ID, self.importance_I, None
        value_H1KK = turns.values[self.place].unsqueeze(1)
        moved_HQKK = self.blocks_HQKK @ value_H1KK
        importance_I = (moved_HQKK * value_H1KK).sum(-2).flatten()
        heads_HQKD = before_ID.unflatten(0, moved_HQKK.shape[:3])
        return (value_H1KK.mT @ heads_HQKD).flatten(0, 2), importance_I, moved_HQKK


def entropy(scores_IO: Tensor) -> Tensor:
    """Summed over rows, the entropy in nats of the shares of a row's importance."""
    totals_O = scores_IO.sum(0).clamp_min(_TINY)
    shares_IO = scores_IO / totals_O
    logs_IO = (shares_IO + _TINY).log_()
    return (-(shares_IO * logs_IO).sum(0)).sum()


def pruned_share(scores_IO: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """O times the share of importance lost when each group (unstructured: row) keeps its largest,
    and the derivative (I, O) by the scores. Which are lost is held fixed in the derivative, as it
    is almost everywhere."""
    is_lost_IO = _lost(scores_IO, pattern).to(scores_IO.dtype)
    total = scores_IO.sum().clamp_min(_TINY)
    share = (scores_IO * is_lost_IO).sum() / total
    num_rows = scores_IO.shape[1]
    return num_rows * share, is_lost_IO.sub_(share).mul_(num_rows / total)


def _lost(scores_IO: Tensor, pattern: Pattern) -> Tensor:
    """bool (I, O): what the pattern prunes. For 2:4 what is below the second highest of four, so
    that of equal scores fewer may be lost: no matter for what is minimised."""
    if (pattern.n, pattern.m) != (2, 4):
        return ~keep_mask_from_scores(scores_IO.T, pattern).T
    num_rows = scores_IO.shape[1]
    first_G2O, second_G2O = scores_IO.view(-1, 2, 2, num_rows).unbind(2)
    higher, lower = torch.maximum(first_G2O, second_G2O), torch.minimum(first_G2O, second_G2O)
    best_lower_GO = torch.maximum(*lower.unbind(1))
    second_GO = torch.minimum(*higher.unbind(1)).maximum(best_lower_GO)
    return (scores_IO.view(-1, 4, num_rows) < second_GO.unsqueeze(1)).flatten(0, 1)


def _slopes(
    turned_IO: Tensor, importance_I: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """The pruned share of T_ij^2 h_i; its derivatives by T and by h."""
    importance_I1 = importance_I.unsqueeze(1)
    squares_IO = turned_IO.square()
    loss, slope_IO = pruned_share(squares_IO * importance_I1, pattern)
    by_importance_I = squares_IO.mul_(slope_IO).sum(1)
    return loss, slope_IO.mul_(turned_IO).mul_(2.0 * importance_I1), by_importance_I


def _weight(linear: nn.Linear, turns: RotationParts) -> Tensor:
    return linear.weight.detach().to(turns.flat.dtype)


def _turn_heads(matrix_DO: Tensor, rotation_HKK: Tensor) -> Tensor:
    """R2 on the columns of every key-value head."""
    heads_DHK = matrix_DO.unflatten(1, rotation_HKK.shape[:2])
    return torch.einsum("dhk,hkl->dhl", heads_DHK, rotation_HKK).flatten(1)
