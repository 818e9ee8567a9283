"""The moments of one input, shared by all layers that receive it.

Shape suffixes: I input features (columns), O output features of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sparsify.calibration.hessian import InverseFactor, inverse_factor


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
        return self.num_tokens / len(self.hessian_II)
