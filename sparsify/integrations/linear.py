"""A linear layer that holds packed tensors, and computes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.kernels.packed_linear import packed_linear
from sparsify.packed.layer import DTYPE_NAMES, DTYPES, unpack_layer
from sparsify.packed.layout import Layer


class PackedLinear(nn.Module):
    """In place of an nn.Linear: (..., I) -> (..., O), from packed tensors alone. No gradient.

    Its tensors are those of a packed layer (docs/formats.md), named as in the files: parameters
    without gradients, so that whoever places or offloads parameters does so with them. `to(dtype)`
    changes what a dense layer would change, values and bias; codes and scales stay.

    Args:
        layer: what it holds, of an N:M pattern.
        dtype: of values that are stored as they are, and of the bias.
        has_bias: whether there is one.
    """

    weight: Tensor
    weight_indices: Tensor
    weight_scales: Tensor | None
    weight_zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: Layer, dtype: torch.dtype, has_bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.shape
        self.layer = layer
        self.register_parameter("weight_scales", None)
        self.register_parameter("weight_zeros", None)
        for name, (stored, shape) in layer.parts(DTYPE_NAMES[dtype]).items():
            self._hold(name, torch.empty(shape, dtype=DTYPES[stored]))
        self.register_parameter("bias", None)
        if has_bias:
            self._hold("bias", torch.empty(self.out_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of `x`."""
        scheme = self.layer.scheme
        return packed_linear(
            x, self.weight, self.weight_indices, self.weight_scales, self.weight_zeros, self.bias,
            self.in_features, str(self.layer.pattern), scheme.type, scheme.bits or 0,
            scheme.group_size or 0,
        )  # fmt: skip

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) that it stands for."""
        parts = {name: getattr(self, name).detach() for name in self.layer.parts()}
        return unpack_layer(self.layer, parts, dtype)

    def settle(self) -> None:
        """After loading: stored dtypes where a loader cast them (both ways exact), no gradients."""
        kind = DTYPE_NAMES.get(self.weight.dtype, "F32")
        for name, (stored, _) in self.layer.parts(kind).items():
            self._hold(name, getattr(self, name).detach().to(DTYPES[stored]))
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def extra_repr(self) -> str:
        """What it is, for `print(model)`."""
        layer = self.layer
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {layer.pattern}, {layer.scheme.name}"
        )

    def _hold(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What nn.Module does, with every dtype kept that the format fixes."""
        fixed = set(self.layer.parts())
        if self.layer.scheme.type == "float":
            fixed.remove("weight")
        held: dict[str, Any] = {name: self._parameters[name].data for name in fixed}  # type: ignore[union-attr]
        super()._apply(fn, recurse)
        for name, before in held.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                self._hold(name, before.to(after.device))
        return self
