"""Which model costs least over its life: trained small, or pruned from a larger one.

The loss of a dense model of N parameters after D tokens is L = E + A / N^alpha + B / D^beta. Two
fits of that form bracket what is known: approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556) and
its replication by Besiroglu et al. 2024 (arXiv 2404.10102, table 1), which finds the former's
intervals too narrow. Of the former the exponents are those of the paper's TeX source, which the
replication gives beside its own: the printed ones (E 1.69, alpha 0.34, beta 0.28) are rounded, and
have another optimum than the paper's table A.3, 32 instead of 40 B parameters. Training takes 6 N D
operations and every token that is served 2 N (Sardana et al. 2023, arXiv 2401.00448, who minimise
the sum). Both fits are of models on web text with their own tokenizers: differences between models
of one kind are what they are good for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsify.errors import InputError


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, nats per token."""

    name: str
    irreducible: float
    size_factor: float
    size_exponent: float
    data_factor: float
    data_exponent: float

    def loss(self, num_parameters: float, num_tokens: float) -> float:
        """Nats per token of a dense model."""
        size = self.size_factor / num_parameters**self.size_exponent
        return self.irreducible + size + self.data_factor / num_tokens**self.data_exponent

    def tokens_for(self, num_parameters: float, loss: float) -> float:
        """Tokens after which a model of that size has that loss; infinite if it never does."""
        size = self.size_factor / num_parameters**self.size_exponent
        left = loss - self.irreducible - size
        if left <= 0:
            return math.inf
        return (self.data_factor / left) ** (1 / self.data_exponent)

    def optimal(self, operations: float) -> tuple[float, float]:
        """Parameters and tokens with the least loss for so many operations, with C = 6 N D.

        Hoffmann et al., equation 4: N = G (C / 6)^a, D = G^-1 (C / 6)^b with a = beta / (alpha +
        beta), b = 1 - a and G = (alpha A / (beta B))^(1 / (alpha + beta)).
        """
        alpha, beta = self.size_exponent, self.data_exponent
        scale = (alpha * self.size_factor / (beta * self.data_factor)) ** (1 / (alpha + beta))
        share = beta / (alpha + beta)
        return scale * (operations / 6) ** share, (operations / 6) ** (1 - share) / scale


LAWS = (
    ScalingLaw("Hoffmann 2022", 1.6934, 406.4, 0.3392, 410.7, 0.2849),
    ScalingLaw("Besiroglu 2024", 1.8172, 482.01, 0.3478, 2085.43, 0.3658),
)


@dataclass(frozen=True)
class SmallModel:
    """The dense model that reaches a loss with the least over its life."""

    num_parameters: float
    num_tokens: float
    training: float
    """its cost, in the unit of the prices"""
    serving: float

    @property
    def total(self) -> float:
        """Over its life."""
        return self.training + self.serving


def cheapest_small_model(
    law: ScalingLaw, loss: float, most_parameters: float,
    training_cost: Callable[[float], float], serving_cost: Callable[[float], float],
) -> SmallModel:  # fmt: skip
    """The dense model of the least cost among those that reach a loss.

    Args:
        law: of the loss.
        loss: to be reached, nats per token.
        most_parameters: sizes from a thousandth of this up to it are looked at.
        training_cost: of a training of so many operations.
        serving_cost: of all tokens of a model of so many parameters.

    Returns:
        The best of 2,000 sizes, evenly spread in their logarithm.

    Raises:
        InputError: none of these sizes reaches the loss with any number of tokens.
    """
    best: SmallModel | None = None
    for index in range(2001):
        size = most_parameters * 10 ** (-3 + 3 * index / 2000)
        tokens = law.tokens_for(size, loss)
        if math.isinf(tokens):
            continue
        found = SmallModel(size, tokens, training_cost(6 * size * tokens), serving_cost(size))
        if best is None or found.total < best.total:
            best = found
    if best is None:
        raise InputError(
            f"budget: by {law.name} no dense model of up to {most_parameters:.3g} parameters "
            f"reaches {loss:.3f} nats; raise plan.loss_gap, or lower plan.trained_tokens"
        )
    return best
