"""This project's side of the pruning comparison: one process that loads, prunes, saves, reports.

Started as `python -m jobs.benchmarks.sides.twofour WALK ORDER MODEL ROWS OUT RESULT THREADS
BATCH_SIZE`; the other side is a file of its own that takes the same words after the first two.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path


def now() -> tuple[float, float]:
    """Seconds that have passed, and seconds that the CPUs have worked for this process."""
    return time.perf_counter(), time.process_time()


BEGIN = ("", *now())

# After the clock has started: the time of these imports is a figure of its own.
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # not on first use
from safetensors.torch import load_file

from cluster.machine import peak_memory_bytes
from jobs.benchmarks.support.stopwatch import phase_seconds
from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.layers import InputOrder
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.methods import PruneParams, get_method
from sparsify.models.load import load_pair
from sparsify.models.save import save_model
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, prune_checkpoint, prune_model


def prune_folder(
    walk: str,
    order: InputOrder,
    model: Path,
    rows: Path,
    out: Path,
    result: Path,
    num_threads: int,
    batch_size: int,
) -> None:
    """Prune a model folder 2:4 with SparseGPT and write seconds and peak memory as JSON.

    Args:
        walk: "memory" loads the model, prunes it and saves it; "streamed" does it block by block,
            and all of it counts as pruning.
        order: when inputs are measured, see `sparsify.calibration.layers.SolverNeeds`.
        model: dense model folder with a tokenizer.
        rows: safetensors file with int64 `input_ids` (N, T).
        out: folder for the pruned model.
        result: JSON file to write.
        num_threads: CPU threads.
        batch_size: calibration rows per forward.
    """
    torch.set_num_threads(num_threads)
    method, pattern, params = get_method("sparsegpt"), Pattern.parse("2:4"), PruneParams()
    token_rows = TokenRows.whole(load_file(rows)["input_ids"])
    marks = [("import", *now())]
    imported_bytes = peak_memory_bytes()
    if walk == "streamed":
        marks.append(("load", *marks[0][1:]))
        pruned = prune_checkpoint(
            model, out, token_rows, method, pattern, params,
            comm=Comm.single(), memory=Memory(batch_size), layers=LayerChoice(order=order),
            clock=time.perf_counter,
        )  # fmt: skip
        marks.append(("prune", *now()))
    else:
        dense, tokenizer = load_pair(model)
        marks.append(("load", *now()))
        pruned = prune_model(
            dense, token_rows, method, pattern, params,
            comm=Comm.single(), memory=Memory(batch_size), layers=LayerChoice(order=order),
            clock=time.perf_counter,
        )  # fmt: skip
        marks.append(("prune", *now()))
        save_model(dense, tokenizer, out)
    marks.append(("save", *now()))
    steps = list(itertools.pairwise([BEGIN, *marks]))
    figures = {
        "seconds": {name: wall - begin[1] for begin, (name, wall, _) in steps},
        "cpu_seconds": {name: cpu - begin[2] for begin, (name, _, cpu) in steps},
        "prune_phases": phase_seconds(pruned.layers),
        "peak_bytes": peak_memory_bytes(),
        "imported_bytes": imported_bytes,
    }
    result.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    walk, order, model, rows, out, result, num_threads, batch_size = sys.argv[1:]
    prune_folder(
        walk, order, Path(model), Path(rows), Path(out), Path(result),  # type: ignore[arg-type]
        int(num_threads), int(batch_size),
    )  # fmt: skip
