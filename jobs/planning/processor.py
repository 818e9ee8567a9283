"""What one thread of this machine's CPU reaches, measured in half a second.

A processor's flags do not say it: of two that both have AVX512-BF16, one multiplied bfloat16 seven
times as fast as float32 and the other more slowly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.costs.seconds import Rates

# gloo, whose copies are the workers' own work, and a disk: looked up on one machine. To measure
# them takes a second process, and files.
_LINK, _DISK = 4e8, 1e9

_TOKENS, _INPUTS, _OUTPUTS = 256, 1024, 2048  # of the products: 1.07 GFLOP each
_ROWS, _HEADS, _LENGTH, _HEAD_SIZE = 2, 8, 256, 64  # of the attention
_ELEMENTS = 1 << 21  # of an elementwise operation: 8 MB of float32, as activations are


@cache
def processor_rates(element_bytes: int) -> Rates:
    """What one thread was found to reach by this process; see `measure_rates`."""
    return measure_rates(element_bytes)


def measure_rates(element_bytes: int) -> Rates:
    """What one thread reaches now: products and attention forward and backward, elementwise work.

    Args:
        element_bytes: of a weight: 2 for bfloat16, 4 for float32.
    """
    dtype = torch.bfloat16 if element_bytes == 2 else torch.float32
    with _one_thread():
        products = _products(dtype)
        return Rates(
            products=products,
            attention=_attention(dtype),
            bandwidth=_bandwidth(),
            link=_LINK,
            network=_LINK,
            float32=products if element_bytes == 4 else _products(torch.float32),
            overlaps=False,
            disk=_DISK,
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fastest_s(work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of three calls after a first."""
    work()
    found = []
    for _ in range(3):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def _products(dtype: torch.dtype) -> float:
    """Operations/s of a linear layer's three products."""
    x_TI = torch.ones(_TOKENS, _INPUTS, dtype=dtype)
    weight_OI = torch.ones(_OUTPUTS, _INPUTS, dtype=dtype)
    grad_TO = torch.ones(_TOKENS, _OUTPUTS, dtype=dtype)

    def work() -> tuple[Tensor, ...]:
        return functional.linear(x_TI, weight_OI), grad_TO @ weight_OI, grad_TO.T @ x_TI

    return 3 * 2.0 * _TOKENS * _INPUTS * _OUTPUTS / _fastest_s(work)


def _attention(dtype: torch.dtype) -> float:
    """Operations/s inside causal attention, forward and backward (2.5 times a forward's)."""
    q, k, v = torch.ones(3, _ROWS, _HEADS, _LENGTH, _HEAD_SIZE, dtype=dtype).requires_grad_()

    def work() -> None:
        functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    operations = 4.0 * _ROWS * _HEADS * _HEAD_SIZE * _LENGTH**2 / 2
    return 3.5 * operations / _fastest_s(work)


def _bandwidth() -> float:
    """Bytes/s of an elementwise operation in float32, read and written."""
    x, y = torch.ones(_ELEMENTS), torch.ones(_ELEMENTS)
    return 3 * x.nbytes / _fastest_s(lambda: torch.mul(x, y))
