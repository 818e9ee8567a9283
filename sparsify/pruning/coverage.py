"""How much of a model pruning reaches: what it prunes, and what it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsify.calibration.layers import prunable_linears
from sparsify.models.structure import find_blocks, fused_experts, linears_of


@dataclass(frozen=True)
class Coverage:
    """Weights of a model by what pruning does with them, each counted once."""

    num_weights: int
    """all of the model's"""
    num_in_layers: int
    """of the layers that are pruned, the zeros and the rest"""
    num_left: int
    """of matrices that stay dense although they are neither embeddings, head nor layers that
    prune.skip names"""
    left: list[str]
    """their names, the largest first"""
    num_experts: int
    """of them experts that are fused into one tensor each"""

    def remark(self) -> str | None:
        """What stays dense, in a sentence; None where nothing does that could be pruned."""
        if not self.left:
            return None
        experts = f", {self.num_experts} of them fused experts" if self.num_experts else ""
        left, pruned = self.num_left / self.num_weights, self.num_in_layers / self.num_weights
        return (
            f"{len(self.left)} tensors with {left:.1%} of the weights are no linear layers of the "
            f"decoder blocks and stay dense, such as {self.left[0]}{experts}; the layers that are "
            f"pruned hold {pruned:.1%}"
        )


def coverage(model: Any, skip: Sequence[str] = ()) -> Coverage:
    """What pruning reaches of a transformers model; its weights may be on the meta device.

    Raises:
        InputError: see `prunable_linears`.
    """
    pruned = {id(module.weight) for _, _, module in prunable_linears(model, skip)}
    blocks = find_blocks(model)[1]
    known = {id(m.weight) for block in blocks for m in linears_of(block).values()}
    known |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    known |= {id(p) for p in head.parameters()} if head is not None else set()
    weights = dict(model.named_parameters())
    left = {n: p.numel() for n, p in weights.items() if p.ndim > 1 and id(p) not in known}
    names = sorted(left, key=lambda name: -left[name])
    return Coverage(
        num_weights=sum(p.numel() for p in weights.values()),
        num_in_layers=sum(p.numel() for p in weights.values() if id(p) in pruned),
        num_left=sum(left.values()),
        left=names,
        num_experts=len(left.keys() & set(fused_experts(model))),
    )
