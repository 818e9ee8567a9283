"""One linear layer as each side of `bench deploy` holds it: dense by torch, and packed 2:4.

A side makes several copies of a random weight, which are used in turn, so that none is in a cache
when it is read again. Shape suffixes: O rows, I columns, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.kernels.cpu.layout import KINDS, WITH_GROUPS, Prepared, prepare
from sparsify.kernels.cpu.linear import packed_linear

GROUP_SIZE = 128


@dataclass(frozen=True)
class Side:
    """A layer that can be timed."""

    num_bytes: int
    """what one product reads of the weight: values, positions, scales"""
    run: Callable[[Tensor], Tensor]
    """(T, I) float32 to (T, O); the next copy at every call"""


def dense_linear(dtype: torch.dtype, num_rows: int, num_columns: int, least_bytes: int) -> Side:
    """torch's linear, inputs cast to the weight's type."""
    weight_OI = torch.randn(num_rows, num_columns).to(dtype)
    copies = _copies(weight_OI.nbytes, least_bytes, lambda: weight_OI.clone())
    return Side(weight_OI.nbytes, lambda x: functional.linear(x.to(dtype), next(copies)))


def dense_int4(num_rows: int, num_columns: int, least_bytes: int) -> Side:
    """torch's own kernel for dense INT4 on a CPU, in bfloat16: in float32 it is many times slower.

    Codes with one scale and one zero for 128 columns, both bfloat16.
    """
    codes_OI = torch.randint(0, 16, (num_rows, num_columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
    scales_GO2 = torch.rand(num_columns // GROUP_SIZE, num_rows, 2, dtype=torch.bfloat16)
    num_bytes = packed.nbytes + scales_GO2.nbytes
    copies = _copies(num_bytes, least_bytes, lambda: (packed.clone(), scales_GO2.clone()))

    def run(inputs_TI: Tensor) -> Tensor:
        weight, scales = next(copies)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        output: Tensor = product(inputs_TI.bfloat16(), weight, GROUP_SIZE, scales)
        return output

    return Side(num_bytes, run)


def packed(kind: str, num_rows: int, num_columns: int, least_bytes: int, path: str) -> Side:
    """This project's kernel on a packed 2:4 weight of a kind of values."""
    prepared = random_packed(kind, num_rows, num_columns)
    num_bytes = sum(tensor.nbytes for tensor in prepared if tensor is not None)
    copies = _copies(
        num_bytes, least_bytes,
        lambda: Prepared(*(None if t is None else t.clone() for t in prepared)),  # type: ignore[arg-type]
    )  # fmt: skip
    return Side(
        num_bytes,
        lambda x: packed_linear(x, *next(copies), None, kind, num_rows, GROUP_SIZE, path),
    )


def random_packed(kind: str, num_rows: int, num_columns: int) -> Prepared:
    """A random 2:4 weight in the order of the kernels, symmetric, in groups of 128 columns."""
    num_kept = num_columns // 2
    pairs = torch.tensor([a | b << 2 for a, b in itertools.combinations(range(4), 2)])
    nibbles_OG = pairs.to(torch.uint8)[torch.randint(6, (num_rows, num_columns // 4))]
    indices = nibbles_OG[:, ::2] | nibbles_OG[:, 1::2] << 4
    if KINDS[kind] == torch.uint8:
        weight_OK = torch.randint(0, 256, (num_rows, num_kept // 2), dtype=torch.uint8)
    elif kind == "int8":
        weight_OK = torch.randint(-128, 128, (num_rows, num_kept), dtype=torch.int8)
    else:
        weight_OK = torch.randn(num_rows, num_kept).to(KINDS[kind])
    scales_OG = None
    if kind in WITH_GROUPS:
        scales_OG = torch.rand(num_rows, -(-num_columns // GROUP_SIZE)).half()
    elif kind == "float8":
        scales_OG = torch.rand(num_rows, 1)
    return prepare(kind, num_columns, weight_OK, indices, scales_OG)


def _copies(num_bytes: int, least_bytes: int, make: Callable[[], object]) -> itertools.cycle:
    """At least two copies, with `least_bytes` in all, without end."""
    return itertools.cycle([make() for _ in range(max(2, -(-least_bytes // num_bytes)))])
