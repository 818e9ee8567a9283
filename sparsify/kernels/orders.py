"""How the kernels of a device hold a packed 2:4 layer: their order of its tensors, and the product.

`ORDERS` has one for each type of device that has kernels. Whoever holds packed tensors (a module of
transformers, a linear method of vLLM) brings them into the order once, with about as many bytes,
and back to save them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparsify.kernels.cpu import layout as cpu_layout
from sparsify.kernels.cpu import linear as cpu
from sparsify.kernels.cpu.library import library
from sparsify.kernels.cuda import layout as cuda_layout
from sparsify.kernels.cuda import linear as cuda
from sparsify.kernels.cuda.card import chosen_copy
from sparsify.kernels.cuda.ways import Problem
from sparsify.kernels.triton_jit import triton
from sparsify.packed.layout import Layer


class Parts(NamedTuple):
    """The tensors of a packed layer, in the files' order or in that of kernels."""

    weight: Tensor
    weight_indices: Tensor
    weight_scales: Tensor | None = None
    weight_zeros: Tensor | None = None


class Order(Protocol):
    """What a type of device has."""

    def kind(self, layer: Layer, stored: torch.dtype) -> str | None:
        """What the kernels call the values of a layer in the files' order.

        Args:
            stored: dtype of its `weight`.

        Returns:
            None where there are no kernels for it here.
        """

    def takes(self, kind: str, dtype: torch.dtype) -> bool:
        """Whether inputs may have this dtype."""

    def prepare(self, layer: Layer, kind: str, parts: Parts) -> Parts:
        """From the files' order. Raises InputError where the kernels cannot take the layer."""

    def restore(self, layer: Layer, kind: str, parts: Parts) -> Parts:
        """To the files' order, bit for bit."""

    def choose(
        self, layer: Layer, kind: str, parts: Parts, dtype: torch.dtype
    ) -> tuple[str, list[Tensor]]:
        """The way for many tokens of this dtype, where it holds a copy beside prepared parts.

        Returns:
            Its name and the copy, or "" and nothing.
        """

    def linear(
        self, layer: Layer, kind: str, parts: Parts, x: Tensor, bias: Tensor | None,
        copies: Sequence[Tensor] = (), copy: str = "",
    ) -> Tensor:  # fmt: skip
        """x W^T + bias, (..., O), for prepared parts."""


def _kind(layer: Layer, floats: dict[torch.dtype, str], stored: torch.dtype) -> str | None:
    scheme = layer.scheme
    if str(layer.pattern) != "2:4":
        return None
    kinds = {"fp8": "float8", "nf4": "nf4", "int": f"int{scheme.bits}"}
    return kinds.get(scheme.type) or floats.get(stored)


_CPU_FLOATS = {cpu_layout.KINDS[kind]: kind for kind in ("float32", "bfloat16", "float16")}


class _Cpu:
    """sparsify/kernels/cpu."""

    def kind(self, layer: Layer, stored: torch.dtype) -> str | None:
        """See `Order`; compiles the library at the first call."""
        if layer.num_groups > 1 and (layer.scheme.group_size or 0) % 4:
            return None
        kind = _kind(layer, _CPU_FLOATS, stored)
        return kind if kind is not None and library() is not None else None

    def takes(self, kind: str, dtype: torch.dtype) -> bool:
        """All float types, whatever the values are."""
        return dtype in _CPU_FLOATS

    def prepare(self, layer: Layer, kind: str, parts: Parts) -> Parts:
        """See `cpu.layout`; positions are stored with the values."""
        blocks, scales, zeros = cpu_layout.prepare(kind, layer.shape[1], *parts)
        return Parts(blocks, parts.weight_indices.new_empty(0), scales, zeros)

    def restore(self, layer: Layer, kind: str, parts: Parts) -> Parts:
        """See `cpu.layout`."""
        prepared = cpu_layout.Prepared(parts.weight, parts.weight_scales, parts.weight_zeros)
        return Parts(*cpu_layout.restore(kind, *layer.shape, prepared))

    def choose(
        self, layer: Layer, kind: str, parts: Parts, dtype: torch.dtype
    ) -> tuple[str, list[Tensor]]:
        """None holds a copy."""
        return "", []

    def linear(
        self, layer: Layer, kind: str, parts: Parts, x: Tensor, bias: Tensor | None,
        copies: Sequence[Tensor] = (), copy: str = "",
    ) -> Tensor:  # fmt: skip
        """See `cpu.linear`."""
        size = layer.scheme.group_size or 0
        weight, _, scales, zeros = parts
        return cpu.packed_linear(x, weight, scales, zeros, bias, kind, layer.shape[0], size)


@lru_cache
def _why_no_gpu_kernels() -> str | None:
    """What this machine lacks, said once as a warning."""
    why = None
    if triton is None:
        why = "Triton is not installed; the CUDA build of torch brings the version that fits"
    elif torch.version.hip is not None:
        why = "they are written for NVIDIA's sparse tensor cores"
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        why = "sparse tensor cores come with compute capability 8.0 (Ampere)"
    if why is not None:
        text = f"GPU kernels: {why}; packed layers run in PyTorch, several times slower"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return why


class _Cuda:
    """sparsify/kernels/cuda."""

    def kind(self, layer: Layer, stored: torch.dtype) -> str | None:
        """See `Order`; none where a warning says why."""
        return None if _why_no_gpu_kernels() else _kind(layer, cuda.DTYPES, stored)

    def takes(self, kind: str, dtype: torch.dtype) -> bool:
        """bfloat16 and float16, and what the values are."""
        is_float = kind in cuda.DTYPES.values()
        return dtype in cuda.DTYPES and (not is_float or kind == cuda.DTYPES[dtype])

    def prepare(self, layer: Layer, kind: str, parts: Parts) -> Parts:
        """See `cuda.layout`; waits for it: kernels may read a weight before their turn."""
        size = layer.scheme.group_size or 0
        prepared = Parts(*cuda_layout.prepare(kind, layer.shape[1], size, *parts))
        if prepared.weight.is_cuda:
            torch.cuda.current_stream(prepared.weight.device).synchronize()
        return prepared

    def restore(self, layer: Layer, kind: str, parts: Parts) -> Parts:
        """See `cuda.layout`."""
        size = layer.scheme.group_size or 0
        prepared = cuda_layout.Prepared(*parts)
        return Parts(*cuda_layout.restore(kind, *layer.shape, size, prepared))

    def choose(
        self, layer: Layer, kind: str, parts: Parts, dtype: torch.dtype
    ) -> tuple[str, list[Tensor]]:
        """See `card.chosen_copy`; not while a graph is captured, which could not wait for times."""
        if not parts.weight.is_cuda or torch.cuda.is_current_stream_capturing():
            return "", []
        size, has_zeros = layer.scheme.group_size or 0, parts.weight_zeros is not None
        problem = Problem(kind, *layer.shape, size, has_zeros, cuda.DTYPES[dtype])
        return chosen_copy(problem, cuda_layout.Prepared(*parts))

    def linear(
        self, layer: Layer, kind: str, parts: Parts, x: Tensor, bias: Tensor | None,
        copies: Sequence[Tensor] = (), copy: str = "",
    ) -> Tensor:  # fmt: skip
        """See `cuda.linear`."""
        size = layer.scheme.group_size or 0
        given = list(copies), copy, kind, layer.shape[0], size
        return cuda.packed_linear(x, *parts, bias, *given)


ORDERS: dict[str, Order] = {"cpu": _Cpu(), "cuda": _Cuda()}
"""Type of a device -> the order of its kernels"""
