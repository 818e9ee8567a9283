"""What one operation of torch costs a GPU: operations, bytes, and the seconds that they allow.

Counted from the shapes of what goes in and comes out. An operation takes the longer of its
arithmetic and its bytes (the roofline, Williams et al. 2009, doi 10.1145/1498765.1498785).
Shape suffixes of products: M x K times K x N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.costs.seconds import Rates

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Cost:
    """Of one operation."""

    kind: str = "elementwise"
    """what its arithmetic is: products ("half", "float32"), "attention", "factor" (triangular
    factors and solves), "sweep" (columns one after another), or elementwise work"""
    operations: float = 0.0
    num_bytes: float = 0.0
    """read and written in the memory of the device"""
    link_bytes: float = 0.0
    """between host and device"""

    def seconds(self, rates: Rates) -> tuple[float, str]:
        """The seconds it takes, and what they are bound by."""
        speed = {
            "half": rates.products, "float32": rates.float32, "attention": rates.attention,
            "factor": rates.float32 * _FACTOR_SHARE, "sweep": rates.float32 * _SWEEP_SHARE,
        }.get(self.kind, math.inf)  # fmt: skip
        bounds = {
            self.kind: self.operations / speed,
            "memory": self.num_bytes / rates.bandwidth,
            "host link": self.link_bytes / HOST_LINK,
        }
        found = max(bounds, key=bounds.__getitem__)
        return bounds[found], found


_FACTOR_SHARE, _SWEEP_SHARE = 0.27, 0.035
"""of float32's products, as an H200 reached: docs/results/2026-11-29-bench-model-cuda.json (a
block's factors in 0.156 s) and 2026-11-29-bench-kernel-cuda.json (128 columns of 14,336 rows in
0.27 ms)"""

HOST_LINK = 50e9
"""bytes/s between pinned host memory and the GPU: PCIe 5 with 16 lanes, as it is measured"""


def tensors_of(*given: Any) -> list[Tensor]:
    """All tensors in arguments or results, lists of them included."""
    found: list[Tensor] = []
    for one in given:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += tensors_of(*one)
    return found


def bytes_of(tensors: Iterable[Tensor]) -> float:
    """Bytes that reading or writing them takes: an expanded one is read as what it is made of."""
    return float(sum(_distinct(tensor) * tensor.element_size() for tensor in tensors))


def _distinct(tensor: Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride)


def cost_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
    """The cost of an ATen operation.

    Args:
        name: without namespace and overload.
        args, kwargs: given to it.
        out: what it returned.
    """
    read = [value for key, value in kwargs.items() if key != "out"]
    ins, outs = tensors_of(args, read), tensors_of(out)
    devices = {tensor.device.type for tensor in (*ins, *outs)}
    if name in ("copy_", "_to_copy") and len(devices) == 2:
        return Cost("copy", link_bytes=bytes_of(outs))
    if "cuda" not in devices:
        return Cost()  # the host's own work hides behind the device, or is waited for as the host
    num_bytes = bytes_of(outs) if name in _WRITERS else bytes_of(ins) + bytes_of(outs)
    if name in _ARITHMETIC:
        operations = _ARITHMETIC[name](args, out)
        # What is added to a product may be of another type.
        factors = tensors_of(args[1:]) if "add" in name else ins
        first = next(tensor for tensor in factors if tensor.is_floating_point())
        kind = "half" if first.dtype in _HALF else "float32"
        kind = "factor" if name in _FACTORS else kind
        return Cost(kind, operations, num_bytes)
    return Cost(num_bytes=num_bytes)


_FACTORS = ("linalg_cholesky_ex", "cholesky_inverse", "linalg_solve_triangular",
            "triangular_solve")  # fmt: skip

_WRITERS = ("fill_", "zero_", "zeros", "full", "ones", "arange", "zeros_like", "ones_like")
"""They read nothing, though they may be given a tensor."""


def _mm(left: Tensor, right: Tensor) -> float:
    return 2.0 * math.prod(left.shape[:-1]) * left.shape[-1] * right.shape[-1]


_ARITHMETIC: dict[str, Callable[[tuple[Any, ...], Any], float]] = {
    "mm": lambda args, out: _mm(args[0], args[1]),
    "bmm": lambda args, out: _mm(args[0], args[1]),
    "addmm": lambda args, out: _mm(args[1], args[2]),
    "addmm_": lambda args, out: _mm(args[1], args[2]),
    "baddbmm": lambda args, out: _mm(args[1], args[2]),
    "baddbmm_": lambda args, out: _mm(args[1], args[2]),
    "mv": lambda args, out: 2.0 * args[0].numel(),
    "addmv_": lambda args, out: 2.0 * args[1].numel(),
    "linalg_cholesky_ex": lambda args, out: args[0].numel() * args[0].shape[-1] / 3,
    "cholesky_inverse": lambda args, out: 2 * args[0].numel() * args[0].shape[-1] / 3,
    "linalg_solve_triangular": lambda args, out: float(args[0].shape[-1] * args[1].numel()),
    "triangular_solve": lambda args, out: float(args[1].shape[-1] * args[0].numel()),
}  # fmt: skip
