"""Bytes and seconds of a linear layer on a device: what a budget of size or latency counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsify.errors import InputError
from sparsify.pattern import Pattern, check_divides


@dataclass(frozen=True)
class Device:
    """Rates of an accelerator, for the latency model. Defaults: H100 SXM, from its data sheet."""

    bandwidth_bytes_per_s: float = 3.35e12
    """memory bandwidth"""
    dense_flops_per_s: float = 989e12
    """bfloat16 multiply-adds count as two operations"""
    sparse_speedup: float = 2.0
    """arithmetic rate of an N:M product over a dense one, zeros counted as work; 2:4 at best 2"""


def matrix_bytes(
    shape: tuple[int, int], pattern: Pattern | None = None, weight_bits: int = 16
) -> float:
    """Bytes of a matrix, dense or pruned.

    Args:
        shape: (O, I).
        pattern: None for dense. N:M stores n of m values and ceil(log2 m) bits for the place of
            each (2:4: 2 bits); unstructured stores the survivors and one bit per weight.
        weight_bits: bits of one stored value.

    Raises:
        InputError: the pattern does not divide I, or weight_bits is below 1.
    """
    if weight_bits < 1:
        raise InputError(f"weight_bits={weight_bits}: must be at least 1")
    num_rows, num_columns = shape
    if pattern is None:
        return num_rows * num_columns * weight_bits / 8
    check_divides("matrix", num_columns, pattern)
    num_kept = pattern.num_kept(num_columns)
    if pattern.is_structured:
        row_bits = num_kept * (weight_bits + math.ceil(math.log2(pattern.m)))
    else:
        row_bits = num_kept * weight_bits + num_columns
    return num_rows * row_bits / 8


def matrix_latency(
    shape: tuple[int, int],
    pattern: Pattern | None = None,
    weight_bits: int = 16,
    num_tokens: int = 1,
    device: Device | None = None,
) -> float:
    """Seconds of one product with the matrix, by the roofline: the slower of memory and arithmetic.

    Args:
        shape, pattern, weight_bits: see `matrix_bytes`.
        num_tokens: columns of the other factor. 1 is decoding one sequence, where reading the
            weights is all that counts; thousands are a prefill, where arithmetic is.
        device: rates; None for the defaults. Launches, activations and attention are left out.

    Raises:
        InputError: see `matrix_bytes`; num_tokens is below 1.
    """
    if num_tokens < 1:
        raise InputError(f"num_tokens={num_tokens}: must be at least 1")
    device = device or Device()
    memory = matrix_bytes(shape, pattern, weight_bits) / device.bandwidth_bytes_per_s
    speedup = device.sparse_speedup if pattern is not None and pattern.is_structured else 1.0
    arithmetic = 2 * num_tokens * math.prod(shape) / (device.dense_flops_per_s * speedup)
    return max(memory, arithmetic)
