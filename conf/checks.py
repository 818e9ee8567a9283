"""Rules that groups of options share; each passes or raises one line with field, value and fix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import sparsify
from sparsify.errors import InputError

if TYPE_CHECKING:
    from cluster.spec import ClusterSpec

DTYPES = ("float32", "bfloat16", "float16")


def _modules(folder: str) -> tuple[str, ...]:
    """Names of the modules of a folder of `sparsify`, listed without importing."""
    paths = (Path(sparsify.__path__[0]) / folder).glob("*.py")
    return tuple(sorted(path.stem for path in paths if not path.stem.startswith("_")))


METHODS = _modules("methods")
"""Pruning methods that exist: the modules of `sparsify/methods`."""

RULES = _modules("dropping")
"""Ways to choose layers to drop: the modules of `sparsify/dropping`."""

SCHEMES = _modules("quantization/schemes")
"""What weights are quantised to: the modules of `sparsify/quantization/schemes`."""

FORMATS = tuple(name.replace("_", "-") for name in _modules("formats/kinds"))
"""Formats to export in: the modules of `sparsify/formats/kinds`."""


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


class Given(NamedTuple):
    """An option: its name, its value, and the one that it has where nobody sets it."""

    name: str
    value: int
    usual: int

    @classmethod
    def of(cls, name: str, group: Any) -> Given:
        """The option `name`, a field of `group`."""
        field = name.rpartition(".")[2]
        return cls(name, getattr(group, field), getattr(type(group), field))


def _set_here(options: Sequence[Given]) -> str:
    """Those options that somebody set, as they were written; the first one if nobody did."""
    found = [option for option in options if option.value != option.usual] or options[:1]
    return " ".join(f"{option.name}={option.value}" for option in found)


def one_step(tokens: Given, batch: Given, length: Given) -> None:
    """Require tokens for one optimizer step at least; names the options that were set."""
    needed = batch.value * length.value
    if tokens.value < needed:
        raise InputError(
            f"{_set_here((tokens, batch, length))}: {tokens.name} is less than one step of "
            f"{needed} tokens ({batch.name} {batch.value} x {length.name} {length.value}); use "
            f"{tokens.name} of at least {needed}, or a smaller {batch.name} or {length.name}"
        )


def one_row(tokens: Given, length: Given) -> None:
    """Require tokens for one row at least; names the options that were set."""
    if tokens.value < length.value:
        raise InputError(
            f"{_set_here((tokens, length))}: {tokens.name} is less than one row of "
            f"{length.name}={length.value} tokens; use {tokens.name} of at least {length.value}, "
            f"or a shorter {length.name}"
        )
