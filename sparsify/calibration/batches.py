"""Calibration rows in batches, and which of them a process takes.

Shape suffixes: N rows, T tokens of a row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import CalibrationError, InputError


@dataclass(frozen=True)
class Batch:
    """Some consecutive calibration rows."""

    number: int
    """the same for every number of processes"""
    where: slice
    """in all rows"""
    rows: TokenRows


def lanes_of(rows: TokenRows, comm: Comm, batch_size: int) -> list[list[Batch]]:
    """This process's lanes of batches.

    The batches and their numbers are the same for every number of processes, as long as there are
    as many of them as lanes.
    """
    if rows.ids_NT.ndim != 2 or rows.ids_NT.shape[1] == 0:
        raise CalibrationError(
            f"calibration rows have shape {tuple(rows.ids_NT.shape)}; expected (rows, tokens)"
        )
    num_lanes = comm.num_lanes
    if len(rows) < num_lanes:
        what = "lanes of a fixed order" if comm.is_fixed else "workers"
        raise CalibrationError(
            f"{len(rows)} calibration rows for {num_lanes} {what}: each needs at least one; "
            "raise prune.num_samples, or use fewer workers"
        )
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: must be at least 1")
    num_batches = max(-(-len(rows) // batch_size), num_lanes)
    edges = [index * len(rows) // num_batches for index in range(num_batches + 1)]
    batches = [
        Batch(number, slice(start, stop), rows[start:stop])
        for number, (start, stop) in enumerate(itertools.pairwise(edges))
    ]
    return [batches[lane] for lane in comm.lanes(num_batches)]
