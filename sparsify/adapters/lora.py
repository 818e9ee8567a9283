"""LoRA (Hu et al. 2021, arXiv 2106.09685) on a sparse layer: trained under its mask, or cut later.

A layer with weight W (O, I), keep mask M, adapters A (r, I) and B (O, r) and scale s = alpha / r:

    masked      y = x (W + s M * (B A))^T     trained as it is merged
    at_merge    y = x W^T + s (x A^T) B^T     plain LoRA; what lies outside M is cut at the merge

Either way the merge is W + s M * (B A), with zeros where M has them. W gets no gradient and may be
stored in any form that gives it back (4 bits): it is asked for when it is needed and let go.
Shape suffixes: O output, I input features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sparsify.errors import InputError
from sparsify.masks.storage import mask_from_bits, mask_to_bits

WAYS = ("masked", "at_merge")


class LowRank(nn.Module):
    """The adapter of one linear layer; `attach` puts it there.

    Args:
        linear: the layer, whose weight is frozen.
        rank: r, at least 1.
        alpha: s times r.
        keep_mask: bool (O, I); None for a dense layer.
        way: of `WAYS`.
        weight: gives the frozen weight (O, I) where `linear` does not hold it as a tensor.
        generator: draws A, on the CPU; B starts at zero, so that nothing changes at first.

    Cost: r (O + I) float32 parameters and a bit a weight. In the way `masked` every forward and
    backward pass makes an O x I product of the adapters, one layer's at a time; nothing of that
    size is kept between the two.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, keep_mask: Tensor | None, way: str,
        weight: Callable[[], Tensor] | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if way not in WAYS:
            raise InputError(f"adapter way {way!r}: use one of {', '.join(WAYS)}")
        shape = linear.out_features, linear.in_features
        if keep_mask is not None and keep_mask.shape != shape:
            raise InputError(
                f"adapter: mask of shape {tuple(keep_mask.shape)} for a layer of {shape}; masks "
                "and model are of different runs"
            )
        device = linear.weight.device
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        bound = 1 / math.sqrt(linear.in_features)  # Kaiming's with a = sqrt(5), as published
        drawn_RI = torch.empty(rank, linear.in_features, dtype=dtype)
        drawn_RI.uniform_(-bound, bound, generator=generator)
        self.down_RI = nn.Parameter(drawn_RI.to(device))
        self.up_OR = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype).to(device))
        self.scale, self.way, self._shape = alpha / rank, way, shape
        bits = None if keep_mask is None else mask_to_bits(keep_mask.to(device))
        self.register_buffer("_bits", bits, persistent=False)
        held = linear.weight
        self._weight = weight or (lambda: held)

    @property
    def keep_mask(self) -> Tensor | None:
        """bool (O, I); None where nothing is pruned."""
        bits: Any = self._bits
        return None if bits is None else mask_from_bits(bits, self._shape)

    def trained_weight(self) -> Tensor:
        """What the layer multiplies with in the way `masked`: the merged weight."""
        return merged(
            self._weight().detach(), self.down_RI.detach(), self.up_OR.detach(), self.scale,
            self.keep_mask,
        )  # fmt: skip

    def forward(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The layer's output (..., O) of inputs (..., I)."""
        if self.way == "masked":
            y: Tensor = _Masked.apply(x, self.down_RI, self.up_OR, self)
        else:
            low = functional.linear(x.to(self.down_RI.dtype), self.down_RI)
            change = self.scale * functional.linear(low, self.up_OR)
            y = _Frozen.apply(x, self._weight)
            y = (y + change).to(y.dtype)
        return y if bias_O is None else y + bias_O


def attach(linear: nn.Linear, adapter: LowRank) -> None:
    """Have a layer compute with its adapter, which becomes its submodule `adapter`."""
    linear.adapter = adapter
    linear.forward = lambda x: adapter(x, linear.bias)  # type: ignore[method-assign, assignment]


def freeze(linear: nn.Linear, weight: Callable[[], Tensor]) -> None:
    """Have a layer without an adapter ask for its weight when it is needed."""

    def forward(x: Tensor) -> Tensor:
        y: Tensor = _Frozen.apply(x, weight)
        return y if linear.bias is None else y + linear.bias

    linear.forward = forward  # type: ignore[method-assign, assignment]


def adapters_of(model: nn.Module) -> dict[str, LowRank]:
    """Full layer name -> adapter, of every layer that has one."""
    return {
        name.removesuffix(".adapter"): module
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
    }


@torch.no_grad()
def merged(
    weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float, keep_mask: Tensor | None
) -> Tensor:
    """W + s M * (B A), added in float32 (float64 for float64) and cast to the type of W.

    Args:
        weight_OI: W, zero where the mask prunes.
        down_RI, up_OR: A and B.
        scale: s.
        keep_mask: M; None keeps all.

    Returns:
        A new tensor, exactly zero where M is False.
    """
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    change_OI = torch.mm(up_OR.to(dtype), down_RI.to(dtype)).mul_(scale)
    change_OI += weight_OI
    if keep_mask is not None:
        change_OI.masked_fill_(~keep_mask, 0)
    return change_OI.to(weight_OI.dtype)


@torch.no_grad()
def cut_share(down_RI: Tensor, up_OR: Tensor, keep_mask: Tensor) -> float:
    """Share of a plain LoRA's change, by its squared norm, that the merge under a mask cuts off."""
    change_OI = torch.mm(up_OR.double(), down_RI.double()).square_()
    total = float(change_OI.sum())
    return float(change_OI.masked_fill_(keep_mask, 0).sum()) / total if total else 0.0


class _Masked(torch.autograd.Function):
    """x (W + s M * (B A))^T; the weight is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down_RI: Tensor, up_OR: Tensor, layer: LowRank) -> Tensor:
        ctx.save_for_backward(x, down_RI, up_OR)
        ctx.layer = layer
        return functional.linear(x, layer.trained_weight())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, down_RI, up_OR = ctx.saved_tensors
        grad_x = grad @ ctx.layer.trained_weight() if ctx.needs_input_grad[0] else None
        slope_OI = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(down_RI.dtype)
        keep_mask = ctx.layer.keep_mask
        if keep_mask is not None:
            slope_OI.masked_fill_(~keep_mask, 0)
        slope_OI *= ctx.layer.scale
        return grad_x, up_OR.T @ slope_OI, slope_OI @ down_RI.T, None


class _Frozen(torch.autograd.Function):
    """x W^T of a weight without gradient, which is asked for again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, weight().detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.weight().detach(), None
