"""Rules of the options: each function passes or raises one line with field, value, rule and fix."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sparsify
from sparsify.errors import InputError

if TYPE_CHECKING:
    from cluster.spec import ClusterSpec

DTYPES = ("float32", "bfloat16", "float16")

_RENAMED = {
    "resolve": "sparsegpt_refit", "teacher": "sparsegpt_teacher", "descent": "group_descent",
}  # fmt: skip
"""words that options once took -> what they are called now, for the message alone"""


def method_names() -> tuple[str, ...]:
    """Pruning methods that exist: the modules of `sparsify/methods`, listed without importing."""
    folder = Path(sparsify.__path__[0]) / "methods"
    return tuple(sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")))


def as_list(values: Sequence[object]) -> str:
    """`values` as a list is written on the command line."""
    return f"[{','.join(map(str, values))}]"


def close_match(text: str, known: Sequence[str]) -> str:
    """' (did you mean X?)' for the known word nearest to `text`, or nothing."""
    if (renamed := _RENAMED.get(text)) in known:
        return f" (it is now called {renamed})"
    close = difflib.get_close_matches(text, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def in_range(
    field: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Require a finite number with `low <= value <= high` and `above < value < below`."""
    wanted = [
        f"{word} {limit:,}" if limit < 2**53 else f"{word} 2**63 - 1"
        for word, limit in (
            ("at least", low), ("more than", above), ("at most", high), ("less than", below),
        )
        if limit is not None
    ]  # fmt: skip
    if not math.isfinite(value):
        raise InputError(f"{field}={value}: must be a finite number, {' and '.join(wanted)}")
    inside = (low is None or value >= low) and (high is None or value <= high)
    strictly = (above is None or value > above) and (below is None or value < below)
    if not (inside and strictly):
        raise InputError(f"{field}={value}: must be {' and '.join(wanted)}")


def one_of(field: str, value: object, known: Sequence[object]) -> None:
    """Require one of the known values."""
    if value not in known:
        words = [str(item) for item in known]
        raise InputError(
            f"{field}={value}: unknown value{close_match(str(value), words)}; "
            f"use one of: {', '.join(words)}"
        )


def not_blank(field: str, value: str | None, optional: bool = False) -> None:
    """Require text that is more than spaces; None passes where the option is optional."""
    if value is None and optional:
        return
    if not value or not value.strip():
        hint = f"; give a value or leave {field} out" if optional else "; give a value"
        raise InputError(f"{field}: is empty{hint}")


def no_duplicates(field: str, values: Sequence[str]) -> None:
    """Require every value once."""
    if len(set(values)) != len(values):
        once = as_list(list(dict.fromkeys(values)))
        raise InputError(f"{field}={as_list(values)}: names a value twice; use {once}")


def nearest_multiples(value: int, unit: int) -> str:
    """The positive multiples of `unit` on either side of `value`, as 'A or B'."""
    below = value // unit * unit
    return " or ".join(str(v) for v in (below, below + unit) if v > 0)


def half_needs_gpu(dtype: str, cluster: ClusterSpec) -> None:
    """Refuse float16 on CPU workers: its range overflows in the sums that the CPU keeps in it."""
    if dtype == "float16" and not cluster.uses_gpu:
        raise InputError(
            f"model.dtype=float16: needs GPUs and cluster {cluster.name!r} has none; "
            "use model.dtype=bfloat16 or float32, or a GPU cluster such as +cluster=h100x8"
        )


def one_step(field: str, num_tokens: int, batch_size: int, sequence_length: int) -> None:
    """Require tokens for one optimizer step at least."""
    needed = batch_size * sequence_length
    if num_tokens < needed:
        raise InputError(
            f"{field}={num_tokens}: less than one step of {needed} tokens "
            f"(batch_size {batch_size} x sequence_length {sequence_length}); "
            f"use at least {needed}, or a smaller batch_size"
        )


def one_row(field: str, num_tokens: int, sequence_length: int) -> None:
    """Require tokens for one row at least."""
    if num_tokens < sequence_length:
        raise InputError(
            f"{field}={num_tokens}: less than one row of data.sequence_length={sequence_length} "
            f"tokens; use at least {sequence_length}"
        )
