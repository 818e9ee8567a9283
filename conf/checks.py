"""Rules that groups of options share; each passes or raises one line with field, value and fix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sparsify
from sparsify.errors import InputError

if TYPE_CHECKING:
    from cluster.spec import ClusterSpec

DTYPES = ("float32", "bfloat16", "float16")

METHODS = tuple(
    sorted(
        path.stem
        for path in (Path(sparsify.__path__[0]) / "methods").glob("*.py")
        if not path.stem.startswith("_")
    )
)
"""Pruning methods that exist: the modules of `sparsify/methods`, listed without importing."""


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
    """Require tokens for one optimizer step at least; `field` names the option of tokens."""
    group = field.removesuffix("num_tokens")
    batch, rows = f"{group}batch_size", f"{'data.' if group else ''}sequence_length"
    needed = batch_size * sequence_length
    if num_tokens < needed:
        raise InputError(
            f"{field}={num_tokens} with {batch}={batch_size} and {rows}={sequence_length}: less "
            f"than one step of {needed} tokens; use at least {needed}, a smaller {batch}, "
            f"or a smaller {rows}"
        )


def one_row(field: str, num_tokens: int, sequence_length: int) -> None:
    """Require tokens for one row at least."""
    if num_tokens < sequence_length:
        raise InputError(
            f"{field}={num_tokens} with data.sequence_length={sequence_length}: less than one row; "
            f"use at least {sequence_length}, or a smaller data.sequence_length"
        )
