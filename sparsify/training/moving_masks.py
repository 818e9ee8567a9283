"""Masks that follow the weights for the first part of a recovery, then stay: SR-STE.

Shapes: O output features, I input features, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsify.errors import InputError
from sparsify.masks.select import keep_mask_from_scores
from sparsify.masks.storage import BitMasks, mask_from_bits, mask_to_bits
from sparsify.models.masked import layer_weights
from sparsify.pattern import Pattern


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

    Make it before a distributed engine takes the parameters over. Masks are taken inside the
    layers' own forward, where the whole weight is at hand also under ZeRO-3.

    Args:
        model: holds an nn.Linear for every name in `masks`.
        masks: layer name -> bool (O, I), where to begin.
        pattern: what the masks satisfy, and will.
        decay: weight of the pruned weights in their own gradient, >= 0.

    Raises:
        InputError: unknown names, other shapes, a weight shared by two layers, or no nn.Linear.

    Cost: one bit per weight and one bool mask and masked weight at a time.
    """

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Tensor], pattern: Pattern, decay: float
    ) -> None:
        self.is_frozen = False
        self._pattern, self._decay = pattern, decay
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._layers: dict[str, nn.Linear] = {}
        self._bits: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._stale: set[str] = set()
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
            self._shapes[name] = tuple(weight.shape)
            self._bits[name] = self._first[name] = mask_to_bits(masks[name].to(weight.device))
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise InputError(
                    f"distill.moving_share: {name} is a {type(layer).__name__}, and only masks of "
                    "nn.Linear can move; use distill.moving_share=0"
                )
            self._layers[name] = layer
            layer.forward = _Forward(self, name, layer)  # type: ignore[method-assign,assignment]
            weight.register_hook(_FrozenGradient(self, name))

    def refresh(self) -> None:
        """Let every layer take its mask again in its next forward."""
        self._stale = set(self._layers)

    def freeze(self) -> None:
        """Keep the masks as they are from here on; layers compute as they did before."""
        if not self.is_frozen:
            for layer in self._layers.values():
                del layer.forward
        self.is_frozen = True
        self._stale = set()

    def thaw(self) -> None:
        """Let the masks move again: a run went back to where they did."""
        if self.is_frozen:
            self._stand_in()
        self.is_frozen = False

    def _stand_in(self) -> None:
        for name, layer in self._layers.items():
            layer.forward = _Forward(self, name, layer)  # type: ignore[assignment,method-assign]

    def mask(self, name: str) -> Tensor:
        """The layer's mask as it is now, bool (O, I)."""
        return mask_from_bits(self._bits[name], self._shapes[name])

    def masks(self) -> BitMasks:
        """All masks as they are now, and stay in what is returned."""
        return BitMasks(self._bits, self._shapes)

    def load(self, masks: Mapping[str, Tensor]) -> None:
        """Take over the masks of a checkpoint."""
        for name, bits in BitMasks.of(masks).bits.items():
            self._bits[name] = bits.to(self._bits[name].device)

    def share_moved(self) -> float:
        """Share of the weights kept now that were pruned when this began."""
        moved = kept = 0
        for name in self._bits:
            now = self.mask(name)
            moved += int((now & ~mask_from_bits(self._first[name], self._shapes[name])).sum())
            kept += int(now.sum())
        return moved / max(1, kept)

    def bits_for(self, name: str, weight: Tensor) -> Tensor:
        """The bits of the layer's mask, taken again from `weight` if it is due."""
        if name in self._stale:
            self._stale.discard(name)
            scores = weight.detach().abs().float()
            self._bits[name] = mask_to_bits(keep_mask_from_scores(scores, self._pattern))
        return self._bits[name]

    @property
    def decay(self) -> float:
        """Weight of the pruned weights in their own gradient."""
        return self._decay


class _Forward:
    """Stands in for a layer's forward while its mask moves."""

    def __init__(self, moving: MovingMasks, name: str, layer: nn.Linear) -> None:
        self._moving, self._name, self._layer = moving, name, layer

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._layer.weight
        bits = self._moving.bits_for(self._name, weight)
        y = _MaskedLinear.apply(x, weight, bits, self._moving.decay)
        return y if self._layer.bias is None else y + self._layer.bias


class _FrozenGradient:
    """Gradient hook: nothing while the mask moves, zero where pruned afterwards."""

    def __init__(self, moving: MovingMasks, name: str) -> None:
        self._moving, self._name = moving, name

    def __call__(self, grad: Tensor) -> Tensor | None:
        if not self._moving.is_frozen:
            return None
        # Not a product: it would keep NaN and infinity.
        return grad.masked_fill(~self._moving.mask(self._name), 0)


class _MaskedLinear(torch.autograd.Function):
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
