"""Masks that follow the weights for the first part of a recovery, then stay: SR-STE.

Shapes: O output features, I input features, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsify.errors import InputError
from sparsify.masks.select import keep_mask_from_scores
from sparsify.masks.storage import BitMasks, mask_from_bits, mask_to_bits
from sparsify.models.masked import layer_weights
from sparsify.pattern import Pattern

Gathered = Callable[[Tensor], AbstractContextManager[Any]]


class MovingMasks:
    """Lets the pruned weights of a model train under their masks, until `freeze`.

    While they move, a layer computes with masked weights and its weights, the pruned ones too, get
    the gradient of the masked ones (straight through), plus a decay of the pruned ones:

        y = x (W * M)^T,    dW = d(W * M) + decay * W * (1 - M),

    and M keeps the largest |W| of every group, taken again after `refresh` (Zhou et al. 2021, arXiv
    2102.04010, equation 7; there M is taken again in every step). The optimizer sees the sum as the
    gradient, so AdamW rescales the decay with it. The weights under the first masks are zero where
    a pruned model begins, or alive where a dense one does. After `freeze` the gradients of pruned
    weights are zero, as with masks that never moved; zeroing the weights and moments is the
    caller's part.

    A layer whose mask moves is a `MaskedLinear`, which reads the mask's bits from a buffer: code
    that torch.compile makes of one block serves all, for nothing in it belongs to a layer.

    Make it before a distributed engine takes the parameters over.

    Args:
        model: holds an nn.Linear for every name in `masks`.
        masks: layer name -> bool (O, I), where to begin.
        pattern: what the masks satisfy, and will.
        decay: weight of the pruned weights in their own gradient, >= 0.
        has_hooks: whether hooks zero the gradients of pruned weights after `freeze`; else it is the
            caller's part too.

    Raises:
        InputError: unknown names, other shapes, a weight shared by two layers, or no nn.Linear.

    Cost: one bit per weight and one bool mask and masked weight at a time.
    """

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Tensor], pattern: Pattern, decay: float,
        has_hooks: bool = True,
    ) -> None:  # fmt: skip
        self.is_frozen = False
        self._has_hooks = has_hooks
        self._pattern, self._decay = pattern, decay
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._layers: dict[str, nn.Linear] = {}
        self._first: dict[str, Tensor] = {}
        self.add(model, masks)

    def add(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Let the masks of more layers move; arguments and errors as of the class."""
        weights = layer_weights(model, masks)
        if len({id(weight) for weight in weights.values()}) != len(weights):
            raise InputError(
                "distill.moving_share: two pruned layers share one weight, whose mask cannot "
                "follow both; use distill.moving_share=0"
            )
        for name, weight in weights.items():
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise InputError(
                    f"distill.moving_share: {name} is a {type(layer).__name__}, and only masks of "
                    "nn.Linear can move; use distill.moving_share=0"
                )
            self._shapes[name], self._layers[name] = tuple(weight.shape), layer
            self._first[name] = mask_to_bits(masks[name].to(weight.device))
            MaskedLinear.take_over(layer, self._first[name], self._decay)
            if self._has_hooks:
                weight.register_hook(_FrozenGradient(self, name))

    def refresh(self, gathered: Gathered = nullcontext) -> None:
        """Let every layer take its mask again from its weight as it is now.

        Args:
            gathered: a context in which a weight that is split over workers is whole.

        Cost: one pass over every weight, with a float32 copy of one at a time.
        """
        if self.is_frozen:
            return
        for layer in self._layers.values():
            with gathered(layer.weight):
                scores = layer.weight.detach().abs().float()
                layer.mask_bits = mask_to_bits(keep_mask_from_scores(scores, self._pattern))

    def freeze(self) -> None:
        """Keep the masks as they are from here on; layers compute as they did before."""
        self.is_frozen = True
        for layer in self._layers.values():
            layer.__class__ = nn.Linear

    def thaw(self) -> None:
        """Let the masks move again: a run went back to where they did."""
        self.is_frozen = False
        for layer in self._layers.values():
            layer.__class__ = MaskedLinear

    def _bits(self, name: str) -> Tensor:
        bits: Tensor = self._layers[name].mask_bits  # type: ignore[assignment]
        return bits

    def mask(self, name: str) -> Tensor:
        """The layer's mask as it is now, bool (O, I)."""
        return mask_from_bits(self._bits(name), self._shapes[name])

    def masks(self) -> BitMasks:
        """All masks as they are now, and stay in what is returned."""
        return BitMasks({name: self._bits(name) for name in self._layers}, self._shapes)

    def load(self, masks: Mapping[str, Tensor]) -> None:
        """Take over the masks of a checkpoint."""
        for name, bits in BitMasks.of(masks).bits.items():
            self._layers[name].mask_bits = bits.to(self._bits(name).device)

    def share_moved(self) -> float:
        """Share of the weights kept now that were pruned when this began."""
        moved = kept = 0
        for name, first in self._first.items():
            now = self.mask(name)
            moved += int((now & ~mask_from_bits(first.to(now.device), self._shapes[name])).sum())
            kept += int(now.sum())
        return moved / max(1, kept)


class MaskedLinear(nn.Linear):
    """What an nn.Linear is while its mask moves; made of one by `take_over`.

    Attributes:
        mask_bits: buffer, uint8, `mask_to_bits` of the mask; not part of the model's state.
        decay: weight of the pruned weights in their own gradient.
    """

    mask_bits: Tensor
    decay: float

    @classmethod
    def take_over(cls, layer: nn.Linear, bits: Tensor, decay: float) -> None:
        """Change the class of a layer, which keeps its parameters, hooks and place in the model."""
        layer.register_buffer("mask_bits", bits, persistent=False)
        layer.decay = decay  # type: ignore[assignment]
        layer.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        """x (W * M)^T + b."""
        y: Tensor = _MaskedProduct.apply(x, self.weight, self.mask_bits, self.decay)
        return y if self.bias is None else y + self.bias


class _FrozenGradient:
    """Gradient hook: nothing while the mask moves, zero where pruned afterwards."""

    def __init__(self, moving: MovingMasks, name: str) -> None:
        self._moving, self._name = moving, name

    def __call__(self, grad: Tensor) -> Tensor | None:
        if not self._moving.is_frozen:
            return None
        # Not a product: it would keep NaN and infinity.
        return grad.masked_fill(~self._moving.mask(self._name), 0)


class _MaskedProduct(torch.autograd.Function):
    """x (W * M)^T; keeps W and the bits of the mask for backward, never the masked copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bits: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(x, weight, bits)
        ctx.decay = decay
        return nn.functional.linear(x, weight * mask_from_bits(bits, weight.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bits = ctx.saved_tensors
        keep = mask_from_bits(bits, weight.shape)
        grad_x = grad @ (weight * keep)
        grad_w = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        return grad_x, grad_w.add_(weight.masked_fill(keep, 0), alpha=ctx.decay), None, None
