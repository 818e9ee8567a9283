"""A linear layer that holds packed tensors, and computes with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.errors import InputError
from sparsify.kernels.cpu import linear as cpu
from sparsify.kernels.cpu.layout import KINDS, Prepared, prepare, restore
from sparsify.kernels.cpu.library import library
from sparsify.kernels.packed_linear import packed_linear
from sparsify.packed.layer import DTYPE_NAMES, DTYPES, unpack_layer
from sparsify.packed.layout import Layer

_FLOAT_KINDS = {KINDS[kind]: kind for kind in ("float32", "bfloat16", "float16")}
"""dtype of stored values -> what the CPU kernels call it; inputs have these dtypes too"""

_ARRANGING = threading.Lock()  # of all layers: two threads must not rearrange one


class PackedLinear(nn.Module):
    """In place of an nn.Linear: (..., I) -> (..., O), from packed tensors alone. No gradient.

    Its tensors are those of a packed layer (docs/formats.md), named as in the files: parameters
    without gradients, so that whoever places or offloads parameters does so with them. `to(dtype)`
    changes what a dense layer would change, values and bias; codes and scales stay.

    On a CPU a 2:4 layer computes with the kernels of sparsify/kernels/cpu. At the first product it
    brings its tensors into their order, with as many bytes: `weight` then has positions and values,
    `weight_indices` is empty. Whatever else asks for the tensors (`state_dict`, `to`,
    `dense_weight`) brings the order of the files back first. Layers that accelerate offloads, and
    those that the kernels refuse, stay as they are and compute in PyTorch.

    Args:
        layer: what it holds, of an N:M pattern.
        dtype: of values that are stored as they are, and of the bias.
        has_bias: whether there is one.
    """

    uses_kernels: bool = True
    """False, of the class or of one layer: PyTorch on a CPU too, with the bits of a dense layer"""

    kind: str | None
    """what the CPU kernels call its values while its tensors are in their order, else None"""
    weight: Tensor
    weight_indices: Tensor
    weight_scales: Tensor | None
    weight_zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: Layer, dtype: torch.dtype, has_bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.shape
        self.layer = layer
        self.kind = None
        self.register_parameter("weight_scales", None)
        self.register_parameter("weight_zeros", None)
        for name, (stored, shape) in layer.parts(DTYPE_NAMES[dtype]).items():
            self._hold(name, torch.empty(shape, dtype=DTYPES[stored]))
        self.register_parameter("bias", None)
        if has_bias:
            self._hold("bias", torch.empty(self.out_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of `x`."""
        fits = x.dtype in _FLOAT_KINDS and x.shape[-1] == self.in_features
        is_arranged = self._arrange(fits and x.device.type == "cpu")
        return self.product(x, self.bias, is_arranged)  # parameters are looked at after that

    def product(self, x: Tensor, bias: Tensor | None, is_arranged: bool) -> Tensor:
        """The same with another bias, of tensors whose order is known.

        Args:
            x: (..., I).
            bias: (O,) or None.
            is_arranged: whether they are in the order of the CPU kernels (`kind` is not None).
        """
        scheme = self.layer.scheme
        if is_arranged:
            return cpu.packed_linear(
                x, self.weight, self.weight_scales, self.weight_zeros, bias, self.kind,
                self.out_features, scheme.group_size or 0,
            )  # fmt: skip
        return packed_linear(
            x, self.weight, self.weight_indices, self.weight_scales, self.weight_zeros, bias,
            self.in_features, str(self.layer.pattern), scheme.type, scheme.bits or 0,
            scheme.group_size or 0,
        )  # fmt: skip

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) that it stands for."""
        self._arrange(False)
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

    @torch.compiler.assume_constant_result  # compiling runs it, and compiles what comes of it
    def _arrange(self, for_kernels: bool) -> bool:
        """Bring the tensors into the order of the kernels, if they can be, or of the files.

        Returns:
            Whether they are in the kernels' order.

        Cost: nothing where they are; else a copy of this layer, of which one remains.
        """
        with _ARRANGING, torch.inference_mode(False), torch.no_grad():
            kind = self._kind_now() if for_kernels else None
            if kind == self.kind:
                return kind is not None
            if self.kind is not None:
                prepared = Prepared(self.weight, self.weight_scales, self.weight_zeros)
                self._hold_all(*restore(self.kind, self.out_features, self.in_features, prepared))
                self.kind = None
            if kind is not None:
                parts = self.weight, self.weight_indices, self.weight_scales, self.weight_zeros
                try:
                    blocks, scales, zeros = prepare(kind, self.in_features, *parts)
                except InputError:  # a NaN of float8, unsigned codes of 8 bits
                    self.uses_kernels = False  # of this layer
                    return False
                self._hold_all(blocks, self.weight_indices.new_empty(0), scales, zeros)
                self.kind = kind
            return kind is not None

    def _kind_now(self) -> str | None:
        """What the CPU kernels call its values, where they can take this layer."""
        layer, scheme = self.layer, self.layer.scheme
        if not self.uses_kernels or str(layer.pattern) != "2:4" or self.weight.device.type != "cpu":
            return None
        if layer.num_groups > 1 and (scheme.group_size or 0) % 4:
            return None
        hook = getattr(self, "_hf_hook", None)  # accelerate's; it puts back what it has kept
        if any(getattr(own, "offload", False) for own in getattr(hook, "hooks", (hook,))):
            return self.kind
        kinds = {"fp8": "float8", "nf4": "nf4", "int": f"int{scheme.bits}"}
        kind = kinds.get(scheme.type) or self.kind or _FLOAT_KINDS.get(self.weight.dtype)
        return kind if kind is not None and library() is not None else None

    def _hold_all(
        self, weight: Tensor, indices: Tensor, scales: Tensor | None, zeros: Tensor | None
    ) -> None:
        given = {"weight": weight, "weight_indices": indices, "weight_scales": scales}
        for name, tensor in {**given, "weight_zeros": zeros}.items():
            if tensor is not None:
                self._hold(name, tensor)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._arrange(False)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._arrange(False)
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What nn.Module does, with every dtype kept that the format fixes."""
        self._arrange(False)
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
