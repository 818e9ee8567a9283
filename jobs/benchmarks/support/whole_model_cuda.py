"""`bench deploy --device cuda` of a whole model: every side in a process; its table and targets."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from jobs.benchmarks.sides.decode_cuda import SIDES
from jobs.benchmarks.support.record import Table, Target, gigabytes
from jobs.benchmarks.support.whole_model import run_side

NOTE = (
    "whole model: random weights in transformers, a step as one CUDA graph over all layers and the "
    "head, 32 prompt tokens in a static cache; norms, rotary angles and activations compiled; "
    "embeddings and head are dense in every side"
)

_DENSE = "dense bfloat16"

_PROMISED_RATIO = {"bfloat16": 1.4, "int4": 3.3}
"""of cuBLAS's time over this, one prompt"""


def measure_model(options: Namespace) -> list[dict[str, Any]]:
    """What every side measured; see `sides.decode_cuda.measure`.

    Raises:
        TwofourError: a side failed; its log is named.
    """
    found = []
    for side in options.model_sides:
        if side not in SIDES:
            continue  # float32: not served on a GPU
        print(f"{options.model}, {side}", flush=True)
        task = {
            "side": side, "shape": options.model, "vocab_size": options.vocabulary,
            "batches": sorted({int(batch) for batch in options.model_batches}),
        }  # fmt: skip
        place = options.workdir / f"decode-cuda-{side.replace(' ', '-')}"
        words = [sys.executable, "-m", "jobs.benchmarks.sides.decode_cuda"]
        found.append(run_side(side, words, task, place, {}))
    return found


def model_tables(found: list[dict[str, Any]]) -> list[Table]:
    """Milliseconds of a step by batch, and how often faster than dense."""
    batches = sorted({row["batch"] for side in found for row in side["rows"]})
    lines = []
    for side in found:
        cells = []
        for batch in batches:
            taken_s, ratio = _step_s(side, batch), _ratio(found, side, batch)
            cells.append(f"{1e3 * taken_s:.2f}" + ("" if ratio is None else f" ({ratio:.2f}x)"))
        lines.append((side["side"], *cells, gigabytes(side["num_bytes"])))
    headings = ("whole model, ms a step", *(f"batch {batch}" for batch in batches), "weights")
    return [Table(headings, lines)]


def model_targets(found: list[dict[str, Any]]) -> list[Target]:
    """What was promised of one prompt."""
    targets = []
    for side in found:
        promised, ratio = _PROMISED_RATIO.get(side["side"]), _ratio(found, side, 1)
        if promised is not None and ratio is not None:
            what = f"whole model, {side['side']}, batch 1: ratio to cuBLAS"
            targets.append(Target.at_least(what, promised, ratio))
    return targets


def _ratio(found: list[dict[str, Any]], side: dict[str, Any], batch: int) -> float | None:
    for dense in found:
        if dense["side"] == _DENSE and any(row["batch"] == batch for row in side["rows"]):
            return _step_s(dense, batch) / _step_s(side, batch)
    return None


def _step_s(side: dict[str, Any], batch: int) -> float:
    return float(next(row["token_s"] for row in side["rows"] if row["batch"] == batch))
