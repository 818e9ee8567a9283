"""What `bench deploy` shows of measured layers, on whatever device they were measured."""

from __future__ import annotations

import statistics
from typing import Any

from jobs.benchmarks.support.record import Table


def shape_of(row: dict[str, Any]) -> str:
    """Of the layer."""
    return f"{row['rows']} x {row['columns']}"


def mean_ratios(rows: list[dict[str, Any]], batches: list[int]) -> dict[str, list[float]]:
    """Side -> geometric mean of its ratios at each batch."""
    return {
        name: [
            statistics.geometric_mean(
                row["ratio"] for row in rows if (row["side"], row["batch"]) == (name, batch)
            )
            for batch in batches
        ]
        for name in dict.fromkeys(row["side"] for row in rows)
    }


def ratio_table(rows: list[dict[str, Any]], batches: list[int], name: str) -> Table:
    """How many times faster than dense each side is, by batch."""
    by_key = {(shape_of(row), row["side"], row["batch"]): row["ratio"] for row in rows}
    lines = [
        (f"{shape}, {side}", *(f"{by_key[shape, side, batch]:.2f}" for batch in batches))
        for shape, side in dict.fromkeys((shape_of(row), row["side"]) for row in rows)
    ]
    return Table((name, *(f"batch {batch}" for batch in batches)), lines)
