"""Rows of a summary's `results`: which one is which, and what can be said of each."""

from __future__ import annotations

from typing import Any

from conf.checks import SCHEMES
from jobs.reporting import units

Row = dict[str, Any]


def label_of(row: Row) -> str:
    """What people call the result: its label, or its name where it has none."""
    return str(row.get("label") or row["name"])


def is_recovered(name: str) -> bool:
    """Whether a result is of a model that was trained after pruning."""
    return name.startswith(("recovered", "finetuned"))


def quantized_as(name: str) -> str | None:
    """The scheme of a quantised model's result, such as int4; None for other results."""
    scheme = name.rpartition("_")[2]
    return scheme if scheme in SCHEMES and scheme != name else None


def find_result(results: list[Row], name: str | None) -> Row | None:
    """The result called `name`, if it was measured."""
    return next((row for row in results if row.get("name") == name), None)


def is_plottable(row: Row | None) -> bool:
    """Whether a result has a perplexity that a logarithmic axis can show."""
    value = row.get("perplexity") if row is not None else None
    return units.is_drawable(value) and value > 0


def times_dense(row: Row, dense: Row | None) -> float | None:
    """Perplexity as a multiple of the dense model's; None where one of the two cannot be shown."""
    if dense is None or row is dense or not (is_plottable(row) and is_plottable(dense)):
        return None
    return float(row["perplexity"] / dense["perplexity"])
