"""The inline PTX of the GPU kernels in numpy, for Triton's interpreter, which has none.

Written from the PTX manual and the fragment layouts of `mma.sp.m16n8k32` (16-bit): what an
instruction does with the registers of a warp, lane by lane. Tensors have 32 elements a warp.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Array = np.ndarray[Any, Any]

_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4
_ORDERED = [i0 | i1 << 2 for i0 in range(4) for i1 in range(i0 + 1, 4)]


def unsigned(words: Array) -> Array:
    """32 bits of each element, of whatever integer type."""
    return (np.asarray(words).astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)


def to_float(bits: Array, is_half: bool) -> Array:
    """float32 of 16-bit patterns, float16 or bfloat16."""
    if is_half:
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values: Array, is_half: bool) -> Array:
    """16-bit patterns of float32 values, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if is_half:
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def halves(words: Array, is_half: bool) -> tuple[Array, Array]:
    """The low and the high number of each word."""
    words = unsigned(words)
    return to_float(words & 0xFFFF, is_half), to_float(words >> 16, is_half)


def joined(low: Array, high: Array, is_half: bool) -> Array:
    return to_bits(low, is_half) | to_bits(high, is_half) << 16


def pick(a: Array, b: Array, selector: Array) -> Array:
    """prmt.b32 in its default mode."""
    a, b, selector = np.broadcast_arrays(unsigned(a), unsigned(b), unsigned(selector))
    both = [(word >> np.uint32(8 * i)) & 255 for word in (a, b) for i in range(4)]
    found = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & 15
        byte = np.choose(nibble & 7, both)
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
        found |= byte.astype(np.uint32) << np.uint32(8 * i)
    return found


def sparse_product(operands: list[Array], selector: int, is_half: bool) -> list[Array]:
    """mma.sp::ordered_metadata m16n8k32 of each warp."""
    warps = [np.ascontiguousarray(x).reshape(-1, 32) for x in operands]
    a, b, c, meta = warps[:4], warps[4:8], warps[8:12], unsigned(warps[12])
    num_warps = len(meta)
    dense = np.zeros((num_warps, 16, 32), np.float32)
    every = np.arange(num_warps)
    for register, (down, right) in enumerate(((0, 0), (8, 0), (0, 4), (8, 4))):
        first, second = halves(a[register], is_half)
        for lane in range(32):
            row, group = _G[lane] + down, _T[lane] + right
            source = 4 * (row % 8) + 2 * selector + group // 4
            nibble = (meta[:, source] >> np.uint32(16 * (row // 8) + 4 * (group % 4))) & 15
            assert np.isin(nibble, _ORDERED).all(), "positions that the hardware does not take"
            dense[every, row, 4 * group + (nibble & 3)] = first[:, lane]
            dense[every, row, 4 * group + (nibble >> 2)] = second[:, lane]
    inputs = np.zeros((num_warps, 32, 8), np.float32)
    for register in range(4):
        low, high = halves(b[register], is_half)
        inputs[:, 8 * register + 2 * _T, _G] = low
        inputs[:, 8 * register + 2 * _T + 1, _G] = high
    product = dense @ inputs
    places = ((0, 0), (0, 1), (8, 0), (8, 1))
    return [
        (c[i] + product[:, _G + down, 2 * _T + right]).astype(np.float32).reshape(-1)
        for i, (down, right) in enumerate(places)
    ]


def run(ptx: str, operands: list[Array]) -> list[tuple[Array, Any]]:
    """(result, Triton's type) of one inline assembly."""
    if ptx.startswith("mma.sp::ordered_metadata"):
        assert ".m16n8k32.row.col.f32." in ptx
        selector = int(re.search(r"0x([01]);", ptx)[1])  # type: ignore[index]
        found = sparse_product(operands, selector, ".f16.f16." in ptx)
        return [(out, tl.float32) for out in found]
    if ptx.startswith("bar.warp.sync"):
        return [(np.zeros(1, np.int32), tl.int32)]
    if ptx.startswith("prmt.b32 $0, $1, $2, $3;"):
        out = pick(*operands)
    elif ptx.startswith("lop3.b32 $0, $1, $2, $3, 0xea;"):  # the table of (a & b) | c
        a, b, c = map(unsigned, operands)
        out = a & b | c
    elif ptx.startswith("sub.rn.f16x2 $0, $1, $2;"):
        (a, b), (c, d) = halves(operands[0], True), halves(operands[1], True)
        out = joined(a - c, b - d, True)
    elif "mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, $2, m, $1;" in ptx:  # 0xbf80 is -1
        (a, b), (c, d) = halves(operands[0], False), halves(operands[1], False)
        out = joined(a - c, b - d, False)
    elif "mul.rn.f16x2 $0, $1, m;" in ptx or "fma.rn.bf16x2 $0, $1, m, z;" in ptx:
        is_half = "f16x2 $0, $1, m;" in ptx
        bits = int(re.search(r"mov\.b32 m, 0x(....)", ptx)[1], 16)  # type: ignore[index]
        factor = to_float(np.array([bits]), is_half)
        low, high = halves(operands[0], is_half)
        out = joined(low * factor, high * factor, is_half)
    else:
        raise NotImplementedError(ptx)
    return [(np.ascontiguousarray(out).view(np.int32), tl.int32)]


class _Call:
    """What the compiler's builder returns of a call: results by number."""

    def __init__(self, results: list[tuple[Array, Any]]) -> None:
        self.results = results

    def get_result(self, number: int) -> Any:
        out, kind = self.results[number]
        return interpreter.TensorHandle(out, kind)


def install() -> None:
    """Teach the interpreter of this process inline assembly."""

    def create_inline_asm(
        self: object, ptx: str, constraints: str, values: list[Any], types: object, *_: object
    ) -> _Call:
        return _Call(run(ptx, [value.data for value in values]))

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
