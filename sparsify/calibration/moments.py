"""The moments of one input, shared by all layers that receive it; and of several as a stack.

Shape suffixes: I input features (columns), O output features of one layer, E inputs of a stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify.calibration.hessian import InverseFactor, inverse_factor, inverse_factors


@dataclass
class InputMoments:
    """What calibration knows of the input of one or more layers."""

    hessian_II: Tensor
    """float32 mean of x x^T over all processes' tokens"""
    num_tokens: int
    """tokens in the means, over all processes"""
    cross_II: Tensor | None = None
    """float32 mean of y x^T over the same tokens, y being the input that the layers have in the
    dense model; None unless it was asked for, where there are no pairs of y and x, and where all
    layers have `layers.Layer.wanted_OI` instead"""
    num_lent: int = 0
    """of an expert that fewer tokens than input columns reach: how many `routed.Lenders` added"""
    tokens_E11: Tensor | None = None
    """of a stack: the tokens of each, float64 (E, 1, 1)"""
    _factors: dict[float, InverseFactor] = field(default_factory=dict, repr=False)

    def factor(self, damping: float, name: str) -> InverseFactor:
        """The factor of the damped inverse, computed at the first call and kept.

        Args:
            damping: see `hessian.inverse_factor`.
            name: layer, for messages.

        Raises:
            NonFiniteError, SingularHessianError: see `hessian.inverse_factor`.
        """
        if damping not in self._factors:
            self._factors[damping] = inverse_factor(self.hessian_II, damping, name)
        return self._factors[damping]

    def known_factor(self, damping: float) -> InverseFactor | None:
        """The factor if it has been computed."""
        return self._factors.get(damping)

    def put_factor(self, damping: float, factor: InverseFactor) -> None:
        """Take a factor that another process has computed from the same moments."""
        self._factors[damping] = factor

    @property
    def tokens_per_column(self) -> float:
        """Tokens in the means for each input column; few of them make the means noise."""
        return self.num_tokens / self.hessian_II.shape[-1]


def factor_all(
    moments: Sequence[InputMoments], damping: float, names: Sequence[str]
) -> list[InverseFactor]:
    """`InputMoments.factor` of several inputs of one width, computed together where there are two
    or more; each keeps its own."""
    if len(moments) == 1:
        return [moments[0].factor(damping, names[0])]
    known = [factor for found in moments if (factor := found.known_factor(damping)) is not None]
    if len(known) == len(moments):
        return known
    hessian_EII = torch.stack([found.hessian_II for found in moments])
    factors = inverse_factors(hessian_EII, damping, names)
    for found, factor in zip(moments, factors, strict=True):
        found.put_factor(damping, factor)
    return factors


def stacked(moments: Sequence[InputMoments]) -> InputMoments:
    """Several inputs of one width as one whose tensors have a leading dimension; one as it is.

    Args:
        moments: of which all or none have `cross_II`, and factors of the same dampings.

    Returns:
        Their moments; `num_tokens` is of all of them together.
    """
    if len(moments) == 1:
        return moments[0]
    crosses = [found.cross_II for found in moments if found.cross_II is not None]
    assert len(crosses) in (0, len(moments)), "with and without the dense model's inputs"
    factors = {}
    for damping in moments[0]._factors:
        known = [found._factors[damping] for found in moments]
        used = {factor.damping for factor in known}
        assert len(used) == 1, f"factors with dampings {used}"
        factors[damping] = InverseFactor(
            torch.stack([factor.upper_II for factor in known]), used.pop(),
            max(factor.num_attempts for factor in known),
            torch.stack([factor.dead_columns for factor in known]),
        )  # fmt: skip
    return InputMoments(
        torch.stack([found.hessian_II for found in moments]),
        sum(found.num_tokens for found in moments),
        torch.stack(crosses) if crosses else None,
        tokens_E11=_tokens_of(moments),
        _factors=factors,
    )


def _tokens_of(moments: Sequence[InputMoments]) -> Tensor:
    counts = [found.num_tokens for found in moments]
    device = moments[0].hessian_II.device
    return torch.tensor(counts, dtype=torch.float64, device=device).view(-1, 1, 1)
