"""Numbers as people read them: one spelling for the terminal and for the report page.

Pure functions of plain values. A missing value (None) is an en dash; NaN and infinities are spelled
out, never hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeGuard

MISSING = "–"

_Options = ParamSpec("_Options")


def _spelled(
    spell: Callable[Concatenate[float, _Options], str],
) -> Callable[Concatenate[float | None, _Options], str]:
    """`spell` for ordinary numbers; what has no digits is spelled the same everywhere."""

    @functools.wraps(spell)
    def spelled(value: float | None, *args: _Options.args, **kwargs: _Options.kwargs) -> str:
        if value is None:
            return MISSING
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        return spell(value, *args, **kwargs)

    return spelled


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether `value` is there and is an ordinary number."""
    return value is not None and math.isfinite(value)


def is_drawable(value: float | None) -> TypeGuard[float]:
    """Whether `value` is finite and of a size that a scale can hold: 0, or 1e-100 to 1e100."""
    return is_finite(value) and (value == 0 or 1e-100 <= abs(value) <= 1e100)


@_spelled
def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits: 0.0415, 13.2, 1,250, 2.1e-5."""
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    if exponent < -4 or exponent > 6:
        return _power(value, digits)
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def _power(value: float, digits: int) -> str:
    """Exponent form without padding: 2.1e-5, 4.8e7."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@_spelled
def perplexity(value: float) -> str:
    """Two decimals below 100, fewer above, powers of ten from a million on."""
    if value < 100:
        return f"{value:.2f}"
    if value < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value < 1e6 else _power(value, 2)


@_spelled
def percent(value: float, decimals: int = 1) -> str:
    """A share as percent: 0.683 is '68.3 %'."""
    text = f"{100 * value:,.{decimals}f} %"
    return text.removeprefix("-") if float(f"{100 * value:.{decimals}f}") == 0 else text


@_spelled
def ratio(value: float) -> str:
    """A factor: '1.83×'."""
    return f"{value:.2f}×" if value < 100 else f"{significant(value)}×"


@_spelled
def count(value: float) -> str:
    """A whole number with thousands separators."""
    return f"{value:,.0f}"


@_spelled
def _scaled(value: float, base_unit: str, units: str, separator: str) -> str:
    if abs(value) < 1000:
        return f"{value:.0f}{separator}{base_unit}".rstrip()
    scaled = float(value)
    for prefix in units:
        scaled /= 1000
        if abs(scaled) < 999.5 or prefix == units[-1]:
            return f"{significant(scaled)}{separator}{prefix}{base_unit}"
    raise AssertionError("units is not empty")


def size(num_bytes: float | None) -> str:
    """Decimal units: 1 MB is 1,000,000 bytes."""
    return _scaled(num_bytes, "B", "kMGTP", " ")


def large_count(value: float | None) -> str:
    """Three digits and k, M, B or T: '1.24 M' parameters."""
    return _scaled(value, "", "kMBT", " ")


@_spelled
def milliseconds(seconds: float) -> str:
    """'0.42 ms', '12.3 ms', '1,240 ms'."""
    return f"{significant(1e3 * seconds)} ms" if seconds < 1 else f"{1e3 * seconds:,.0f} ms"


@_spelled
def duration(seconds: float) -> str:
    """'0.42 s', '12.3 s', '3 min 12 s', '2 h 05 min'."""
    if seconds < 59.95:
        return (
            f"{seconds:.1f} s" if seconds >= 1 or seconds == 0 else f"{significant(seconds, 2)} s"
        )
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
