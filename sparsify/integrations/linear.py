"""A linear layer that holds packed tensors, and computes with them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.errors import InputError
from sparsify.kernels.orders import ORDERS, Parts
from sparsify.kernels.packed_linear import packed_linear
from sparsify.packed.layer import DTYPE_NAMES, DTYPES, unpack_layer
from sparsify.packed.layout import Layer

_ARRANGING = threading.Lock()  # of all layers: two threads must not rearrange one


class PackedLinear(nn.Module):
    """In place of an nn.Linear: (..., I) -> (..., O), from packed tensors alone. No gradient.

    Its tensors are those of a packed layer (docs/formats.md), named as in the files: parameters
    without gradients, so that whoever places or offloads parameters does so with them. `to(dtype)`
    changes what a dense layer would change, values and bias; codes and scales stay.

    On a CPU or a GPU a 2:4 layer computes with the kernels of sparsify/kernels. At the first
    product it brings its tensors into their order, with as many bytes (on a CPU `weight` then has
    positions and values, and `weight_indices` is empty), and on a GPU the ways for many tokens are
    measured where this user has not had that done (`kernels.cuda.card`). Whatever else asks for
    the tensors (`state_dict`, `to`, `dense_weight`) brings the order of the files back first.
    Layers that accelerate offloads, and those that the kernels refuse, stay as they are and
    compute in PyTorch.

    Args:
        layer: what it holds, of an N:M pattern.
        dtype: of values that are stored as they are, and of the bias.
        has_bias: whether there is one.
    """

    uses_kernels: bool = True
    """False, of the class or of one layer: PyTorch everywhere, with the bits of a dense layer"""

    kind: str | None
    """what the kernels call its values while its tensors are in their order, else None"""
    order: str | None
    """the type of device whose kernels' order it is"""
    copies: list[Tensor]
    """what the chosen way for many tokens holds beside the packed weight, on a GPU"""
    copy: str
    """name of that way, or empty"""
    weight: Tensor
    weight_indices: Tensor
    weight_scales: Tensor | None
    weight_zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: Layer, dtype: torch.dtype, has_bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.shape
        self.layer = layer
        self.kind = self.order = None
        self.copies, self.copy = [], ""
        self.register_parameter("weight_scales", None)
        self.register_parameter("weight_zeros", None)
        for name, (stored, shape) in layer.parts(DTYPE_NAMES[dtype]).items():
            self._hold(name, torch.empty(shape, dtype=DTYPES[stored]))
        self.register_parameter("bias", None)
        if has_bias:
            self._hold("bias", torch.empty(self.out_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of `x`."""
        fits = x.shape[-1] == self.in_features
        is_arranged = self._arrange(x.device.type if fits else None, x.dtype)
        return self.product(x, self.bias, is_arranged)  # parameters are looked at after that

    def product(self, x: Tensor, bias: Tensor | None, is_arranged: bool) -> Tensor:
        """The same with another bias, of tensors whose order is known.

        Args:
            x: (..., I).
            bias: (O,) or None.
            is_arranged: whether they are in the order of kernels (`kind` is not None).
        """
        scheme = self.layer.scheme
        if is_arranged:
            assert self.order is not None  # as is_arranged says
            assert self.kind is not None
            return ORDERS[self.order].linear(
                self.layer, self.kind, self._held(), x, bias, self.copies, self.copy
            )
        return packed_linear(
            x, self.weight, self.weight_indices, self.weight_scales, self.weight_zeros, bias,
            self.in_features, str(self.layer.pattern), scheme.type, scheme.bits or 0,
            scheme.group_size or 0,
        )  # fmt: skip

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) that it stands for."""
        self._arrange(None)
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

    def _held(self) -> Parts:
        return Parts(self.weight, self.weight_indices, self.weight_scales, self.weight_zeros)

    def arrange(self, device: str, dtype: torch.dtype) -> bool:
        """Get ready for products with such inputs on a type of device, as the first one would.

        Returns:
            Whether there are kernels for them.

        Cost: of the first call, a copy of this layer, of which one remains.
        """
        return self._arrange(device, dtype)

    @torch.compiler.assume_constant_result  # compiling runs it, and compiles what comes of it
    def _arrange(self, device: str | None, dtype: torch.dtype | None = None) -> bool:
        """Bring the tensors into the order of a device's kernels, if they can be, or of the files.

        Returns:
            Whether they are in the kernels' order.
        """
        with _ARRANGING, torch.inference_mode(False), torch.no_grad():
            kind = None if device is None else self._kind_now(device, dtype)
            order = None if kind is None else device
            if order == self.order:
                return order is not None
            if self.order is not None:
                assert self.kind is not None
                self._hold_all(ORDERS[self.order].restore(self.layer, self.kind, self._held()))
                self.kind = self.order = None
                self.copies, self.copy = [], ""
            if order is not None:
                assert kind is not None
                try:
                    self._hold_all(ORDERS[order].prepare(self.layer, kind, self._held()))
                except InputError as error:  # a NaN of float8, zeros or groups that they lack
                    self.uses_kernels = False  # of this layer
                    if order == "cuda":
                        text = f"{error}; a layer runs in PyTorch, several times slower"
                        warnings.warn(text, RuntimeWarning, stacklevel=2)
                    return False
                self.kind, self.order = kind, order
                if dtype is not None:
                    held = self._held()
                    self.copy, self.copies = ORDERS[order].choose(self.layer, kind, held, dtype)
            return order is not None

    def _kind_now(self, device: str, dtype: torch.dtype | None) -> str | None:
        """What a device's kernels call its values, where they take this layer and the inputs."""
        order = ORDERS.get(device)
        if not self.uses_kernels or order is None or self.weight.device.type != device:
            return None
        hook = getattr(self, "_hf_hook", None)  # accelerate's; it puts back what it has kept
        if any(getattr(own, "offload", False) for own in getattr(hook, "hooks", (hook,))):
            return self.kind
        kind = self.kind if self.order == device else order.kind(self.layer, self.weight.dtype)
        return kind if kind is not None and dtype and order.takes(kind, dtype) else None

    def _hold_all(self, parts: Parts) -> None:
        for name, tensor in parts._asdict().items():
            if tensor is not None:
                self._hold(name, tensor)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._arrange(None)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._arrange(None)
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What nn.Module does, with every dtype kept that the format fixes."""
        self._arrange(None)
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
