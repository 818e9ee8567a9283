"""Layers that see the tokens that a router sends them: pairs with the dense model, and too few.

Shape suffixes: T tokens that an expert was sent, U those that it was sent in the dense model, I
input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.calibration.hessian import HessianSum
from sparsify.models.experts import ExpertLayer


def dense_inputs_of(
    inputs_TI: Tensor, tokens_T: Tensor, dense_UI: Tensor, dense_tokens_U: Tensor
) -> Tensor:
    """What the dense model has for the tokens that an expert was sent in the pruned one.

    A token that the dense model sends elsewhere has no input there: it counts with its own, so that
    the layer is asked for its own dense output.

    Args:
        inputs_TI: the expert's inputs.
        tokens_T: ids of their tokens, rising.
        dense_UI, dense_tokens_U: the same in the dense model.
    """
    if len(dense_tokens_U) == 0:
        return inputs_TI
    at_T = torch.searchsorted(dense_tokens_U, tokens_T).clamp_(max=len(dense_tokens_U) - 1)
    is_in_both_T = dense_tokens_U[at_T] == tokens_T
    return torch.where(is_in_both_T[:, None], dense_UI[at_T], inputs_TI)


class Lenders:
    """Stand-ins for the moments of experts that too few tokens reach.

    What an expert lacks up to one token for each input column is lent: to layers that read what the
    router sends, by the mean over all experts' tokens, which are all tokens of the layer, each as
    often as it was sent somewhere; to layers that read what the expert itself makes of it, whose
    columns mean something else in every expert, by inputs that are independent and equally large,
    under which weights are judged by their size.

    Args:
        experts: first layer of a group -> what is known of it, of the groups in experts.
        sums: first layer of each group -> its sum, over all processes.
    """

    def __init__(self, experts: dict[str, ExpertLayer], sums: dict[str, HessianSum]) -> None:
        self._experts = experts
        self._sums = sums
        self._means: dict[str, Tensor] = {}

    def num_lent(self, name: str) -> int:
        """How many tokens a group lacks; 0 where it is no expert's."""
        if name not in self._experts:
            return 0
        total = self._sums[name]
        return max(0, total.num_columns - (total.num_tokens if total.weight > 0 else 0))

    def mean(self, name: str, own_II: Tensor | None) -> Tensor:
        """The mean x x^T that a group is lent, float32 (I, I).

        Args:
            name: of a group in an expert.
            own_II: the mean over its own tokens, None if there are none.

        Raises:
            NonFiniteError, CalibrationError: see `hessian.HessianSum.mean`, of all experts.
        """
        layer, total = self._experts[name], self._sums[name]
        if not layer.reads_input:
            size = 1.0 if own_II is None else float(own_II.diagonal().mean())
            return total.eye() * (size or 1.0)
        if layer.kind not in self._means:
            every = total.empty()
            for other, known in self._experts.items():
                if known.kind == layer.kind:
                    every.merge(self._sums[other])
            self._means[layer.kind] = every.mean()
        return self._means[layer.kind]


def blend(own_II: Tensor | None, lent_II: Tensor, num_lent: int) -> Tensor:
    """The mean over as many tokens as there are columns, `num_lent` of them lent."""
    return lent_II if own_II is None else own_II.lerp(lent_II, num_lent / len(lent_II))
