"""From words of a packed weight to registers of two bfloat16 or float16 values: exact, but for NF4.

A tile's four registers of a lane are r = 2q + h (see `layout`); even ones are of row g, odd ones of
row g + 8, and so are zeros. Integers are put below the exponent of a power of two, which is then
taken away.
"""

from __future__ import annotations

from sparsify.kernels.cuda.ptx import and_or, minus, pick, times_power
from sparsify.kernels.triton_jit import jit, tl


@jit
def signed_bytes(word: tl.tensor, IS_HALF: tl.constexpr) -> tl.tensor:
    """The int8 numbers of bytes 0 and 2."""
    if IS_HALF:
        biased = (word & 0x00FF00FF) ^ 0x64806480  # 1152 + v
        return minus(biased, 0x64806480, True)
    low = and_or(word, 0x007F007F, 0x43004300)  # 128 + the low seven bits
    sign = and_or(word, 0x00800080, 0x43004300)  # 128, or 256 where v < 0
    return minus(low, sign, False)


@jit
def float8_bytes(word: tl.tensor, IS_ODD: tl.constexpr, IS_HALF: tl.constexpr) -> tl.tensor:
    """The e4m3 numbers of bytes 0 and 2, or 1 and 3; also subnormal ones."""
    if IS_ODD:
        sign = word & -2147450880  # 0x80008000
        rest = (word >> 1) & 0x3F803F80 if IS_HALF else (word >> 4) & 0x07F007F0
    else:
        sign = (word << 8) & -2147450880
        rest = (word << 7) & 0x3F803F80 if IS_HALF else (word << 4) & 0x07F007F0
    return times_power(sign | rest, IS_HALF)


@jit
def nf4_nibbles(word: tl.tensor, IS_HALF: tl.constexpr) -> tl.tuple:
    """Two registers of the NF4 values that the four low nibbles stand for, rounded to 16 bits.

    A byte is picked among 8 by a nibble's three low bits, in each half of the table, and then one
    of both by the highest bit; once for the values' low bytes, once for their high ones.
    """
    places = word & 0x7777
    halves = and_or(word >> 1, 0x4444, 0x3210)
    if IS_HALF:
        low = pick(
            pick(0x52339200, 0x00D4EA8D, places), pick(0x68E02618, 0x00C9800D, places), halves
        )
        high = pick(
            pick(0xB6B8B9BC, 0x00ADB1B4, places), pick(0x3533312D, 0x3C393837, places), halves
        )
    else:
        low = pick(
            pick(0xCA063280, 0x00BA3D92, places), pick(0xAD7C25A3, 0x803910E2, places), halves
        )
        high = pick(
            pick(0xBEBFBFBF, 0x00BDBEBE, places), pick(0x3E3E3E3D, 0x3F3F3F3E, places), halves
        )
    return pick(low, high, 0x5140), pick(low, high, 0x7362)


@jit
def zero_pairs(zeros: tl.tensor, KIND: tl.constexpr, IS_HALF: tl.constexpr) -> tl.tuple:
    """What is taken from the even and from the odd registers, of the int16 of a lane's two rows."""
    even = (zeros.to(tl.int32) & 0xFF) * 0x00010001
    odd = ((zeros.to(tl.int32) >> 8) & 0xFF) * 0x00010001
    if KIND == "int8":
        return signed_bytes(even, IS_HALF), signed_bytes(odd, IS_HALF)
    base: tl.constexpr = 0x64006400 if IS_HALF else 0x43004300
    return even | base, odd | base


@jit
def tile_registers(
    words: tl.tuple, j: tl.constexpr, zero: tl.tuple, KIND: tl.constexpr,
    HAS_ZEROS: tl.constexpr, IS_HALF: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The four registers of tile `j` of a step, without scales.

    Args:
        words: four, of the piece that has the tile.
        zero: two registers of `zero_pairs`, for int4 always: of 8 where there are none.
    """
    if KIND == "int4":
        word = words[j % 4]
        base: tl.constexpr = 0x64006400 if IS_HALF else 0x43004300
        a0 = minus(and_or(word, 0x000F000F, base), zero[0], IS_HALF)
        a1 = minus(and_or(word >> 4, 0x000F000F, base), zero[1], IS_HALF)
        a2 = minus(and_or(word >> 8, 0x000F000F, base), zero[0], IS_HALF)
        a3 = minus(and_or(word >> 12, 0x000F000F, base), zero[1], IS_HALF)
        return a0, a1, a2, a3
    if KIND == "nf4":
        word = words[j % 4]
        low = nf4_nibbles(word, IS_HALF)
        high = nf4_nibbles(word >> 16, IS_HALF)
        return low[0], low[1], high[0], high[1]
    if KIND == "float8":
        u = words[j % 2 * 2]
        v = words[j % 2 * 2 + 1]
        return (
            float8_bytes(u, False, IS_HALF), float8_bytes(u, True, IS_HALF),
            float8_bytes(v, False, IS_HALF), float8_bytes(v, True, IS_HALF),
        )  # fmt: skip
    if KIND == "int8":
        u = words[j % 2 * 2]
        v = words[j % 2 * 2 + 1]
        a0 = signed_bytes(u, IS_HALF)
        a1 = signed_bytes(u >> 8, IS_HALF)
        a2 = signed_bytes(v, IS_HALF)
        a3 = signed_bytes(v >> 8, IS_HALF)
        if HAS_ZEROS:
            a0 = minus(a0, zero[0], IS_HALF)
            a1 = minus(a1, zero[1], IS_HALF)
            a2 = minus(a2, zero[0], IS_HALF)
            a3 = minus(a3, zero[1], IS_HALF)
        return a0, a1, a2, a3
    return words
