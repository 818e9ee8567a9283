"""How kernels round to the levels of a grid.

A quotient is rounded as IEEE 754 has it and ties go to the even level, as in PyTorch, so that equal
values get equal levels.
"""

from __future__ import annotations

from sparsify.kernels.triton_jit import jit, tl

KINDS = {"integers": 0, "float8": 1, "table": 2}
"""kind of a `Rounding` -> its number in kernels"""


@jit
def nearest_integer(values: tl.tensor) -> tl.tensor:
    """Ties to even, for magnitudes of less than 2^22: beyond 2^23 float32 has integers alone."""
    return (values + 12582912.0) - 12582912.0


@jit
def quotient(values: tl.tensor, scales: tl.tensor) -> tl.tensor:
    """values / scales, 0 where the scale is 0."""
    return tl.div_rn(values, tl.where(scales == 0.0, float("inf"), scales))


@jit
def stored(scales: tl.tensor, IS_HALF: tl.constexpr) -> tl.tensor:
    """Scales as they are stored."""
    if IS_HALF:
        scales = scales.to(tl.float16).to(tl.float32)
    return scales


@jit
def nearest(
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    table_ptr: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tl.tensor:
    """The level nearest to each value; see `Rounding`."""
    ratio = quotient(values, scales)
    if KIND == 2:
        level = tl.zeros_like(ratio) + tl.load(table_ptr)
        for place in tl.static_range(1, LEVELS):
            is_above = ratio > tl.load(table_ptr + LEVELS + place - 1)
            level = tl.where(is_above, tl.load(table_ptr + place), level)
    else:
        bounded = tl.minimum(tl.maximum(ratio, lowest - zeros), highest - zeros)
        if KIND == 1:
            # Eight steps from a power of two to the next, and none finer than 2^-9.
            bits = bounded.to(tl.int32, bitcast=True)
            power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
            step = tl.maximum(power, 0.015625) * 0.125
            level = (bounded + 12582912.0 * step) - 12582912.0 * step
            # A negative value that becomes 0 keeps its sign, as a cast does.
            level = level.to(tl.int32, bitcast=True) | (bits & -2147483648)
            level = level.to(tl.float32, bitcast=True)
        else:
            level = nearest_integer(bounded)
    return level
