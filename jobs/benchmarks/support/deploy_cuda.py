"""`bench deploy` on a GPU: linear layers, dense by cuBLAS and torch's INT4, and packed 2:4."""

from __future__ import annotations

import statistics
from argparse import Namespace
from typing import Any

import torch

from jobs.benchmarks.support import whole_model_cuda
from jobs.benchmarks.support.arguments import settings_of
from jobs.benchmarks.support.linear_sides_cuda import (
    Side,
    copy_bytes_per_s,
    elapsed_s,
    errors_of_all,
    read_bytes_per_s,
    recorded,
    sides_of,
)
from jobs.benchmarks.support.linear_tables import mean_ratios, ratio_table, shape_of
from jobs.benchmarks.support.record import Chart, Outcome, Table, Target
from sparsify.errors import InputError
from sparsify.kernels.cuda.choice import Choices, use
from sparsify.kernels.cuda.layout import KINDS
from sparsify.kernels.triton_jit import require_triton, triton

_MODEL = ("model", "model_sides", "model_batches", "vocabulary")

_PROMISED_RATIO = {"bfloat16": (1.5, 1.4), "int4": (4.0, 3.0)}
"""of cuBLAS's time over this, at batch 1 and 16"""

_PROMISED_SHARE = 0.8

_MOST_ERROR = 5e-3  # bfloat16 results alone are off by 1.7e-3

_NOTES = (
    "times are medians of replays of a CUDA graph over the number of weight copies in it; copies "
    "are four level-2 caches together, so that weights come from memory",
    "ratio: cuBLAS bfloat16 over this; share: bytes of the weight a second over what a kernel that "
    "only reads 2 GiB reaches in the same run",
    "up to 16 tokens packed layers run the fused kernel; beyond, the way that was measured to be "
    "the fastest, with a copy of the weight where it takes one not to be slower than dense",
)


def run(options: Namespace, shapes: list[tuple[int, int]], batches: list[int]) -> Outcome:
    """Time every side on every shape and batch; see `deploy.run`.

    Raises:
        InputError: a kind that the GPU's kernels do not have, or no Triton.
    """
    require_triton()
    for kind in options.kinds:
        if kind not in KINDS or kind == "float16":
            known = ", ".join(name for name in KINDS if name != "float16")
            raise InputError(f"--kinds {kind}: on a GPU use some of: {known}")
    torch.manual_seed(options.seed)
    card = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    errors = errors_of_all(options.kinds) if shapes else []
    worst = max(errors, key=lambda row: row["error"], default=None)
    print(f"largest error: {worst}", flush=True)
    choices = Choices(options.workdir / "choices", card, versions, may_copy=True)
    use(choices)
    read_rate, copy_rate = read_bytes_per_s(), copy_bytes_per_s()
    print(f"{card}: reads {read_rate / 1e9:.0f} GB/s, copies {copy_rate / 1e9:.0f}", flush=True)
    measured: list[dict[str, Any]] = []
    for rows, columns in shapes:
        sides = sides_of(rows, columns, options.kinds, choices, max(batches))
        for batch in batches:
            print(f"{rows} x {columns}, batch {batch}", flush=True)
            measured += _measure(sides, rows, columns, batch, options.repeats, read_rate)
        del sides
        torch.cuda.empty_cache()
    settings = settings_of(options, "shapes", "batches", "kinds", "repeats", "seed", *_MODEL)
    settings |= {"card": card, **versions, "cuda": torch.version.cuda}
    outcome = summarise(measured, settings, torch.get_num_threads())
    if options.model != "none":
        whole = whole_model_cuda.measure_model(options)
        outcome.tables += whole_model_cuda.model_tables(whole)
        outcome.targets += whole_model_cuda.model_targets(whole)
        outcome.notes.append(whole_model_cuda.NOTE)
        outcome.figures["model"] = whole
    if worst is not None:
        what = "largest error of any kind"
        outcome.targets.insert(0, Target.at_most(what, _MOST_ERROR, worst["error"]))
    outcome.figures |= {
        "errors": errors, "read_bytes_per_s": read_rate, "copy_bytes_per_s": copy_rate,
        "choices": [list(row) for row in choices.rows()],
    }  # fmt: skip
    if choices.found:
        outcome.tables.append(_choice_table(choices))
    return outcome


def _measure(
    sides: dict[str, Side], rows: int, columns: int, batch: int, repeats: int, read_rate: float
) -> list[dict[str, Any]]:
    """Seconds of a product of each side; in each round the graphs of all sides take turns."""
    inputs_TI = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
    graphs = {name: recorded(side, inputs_TI) for name, side in sides.items()}
    taken_s: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 2):
        for name, graph in graphs.items():
            taken_s[name].append(elapsed_s(graph.replay, 5) / len(sides[name].calls))
    median_s = {name: statistics.median(times[2:]) for name, times in taken_s.items()}
    return [
        {
            "rows": rows, "columns": columns, "batch": batch, "side": name, "median_s": seconds,
            "fastest_s": min(taken_s[name][2:]), "slowest_s": max(taken_s[name][2:]),
            "ratio": median_s["dense bfloat16"] / seconds, "num_bytes": sides[name].num_bytes,
            "bytes_per_s": sides[name].num_bytes / seconds,
            "share": sides[name].num_bytes / seconds / read_rate,
        }
        for name, seconds in median_s.items()
    ]  # fmt: skip


def summarise(
    measured: list[dict[str, Any]], settings: dict[str, Any], num_threads: int
) -> Outcome:
    """Tables of ratios by batch and of memory at the smallest; targets; a chart."""
    batches = sorted({row["batch"] for row in measured})
    curves: dict[str, Any] = {**mean_ratios(measured, batches)}
    chart = Chart(
        "Speed over cuBLAS bfloat16 (mean over shapes)", "tokens at once", batches, curves
    )
    targets = _targets(measured)
    summary = {
        "ratio_at_1": {name: round(values[0], 3) for name, values in curves.items()},
        "targets_met": sum(target.is_met for target in targets),
        "targets": len(targets),
    }
    tables = []
    if measured:
        tables = [ratio_table(measured, batches, "ratio"), _memory_table(measured, batches[0])]
    figures = {"layers": measured}
    return Outcome(
        "cuda", num_threads, settings, figures, tables, targets, list(_NOTES), chart, summary
    )


def _memory_table(rows: list[dict[str, Any]], batch: int) -> Table:
    lines = [
        (
            f"{shape_of(row)}, {row['side']}", f"{1e6 * row['median_s']:.1f}",
            f"{row['num_bytes'] / 1e6:.1f}", f"{row['bytes_per_s'] / 1e9:.0f}",
            f"{100 * row['share']:.0f} %", f"{row['ratio']:.2f}",
        )
        for row in rows
        if row["batch"] == batch
    ]  # fmt: skip
    return Table((f"batch {batch}", "us", "MB", "GB/s", "of reading", "ratio"), lines)


def _choice_table(choices: Choices) -> Table:
    lines = [
        (f"{name}, {tokens} tokens", way, f"{1e6 * seconds:.1f}", f"{ratio:.2f}")
        for name, tokens, way, seconds, ratio in choices.rows()
    ]
    return Table(("choice", "way", "us", "ratio to dense"), lines)


def _targets(rows: list[dict[str, Any]]) -> list[Target]:
    """What was promised, at the worst shape."""
    targets = []
    for kind, (at_1, at_16) in _PROMISED_RATIO.items():
        own = {batch: [row for row in rows if (row["side"], row["batch"]) == (kind, batch)]
               for batch in (1, 16)}  # fmt: skip
        for batch, promised in ((1, at_1), (16, at_16)):
            if own[batch]:
                least = min(row["ratio"] for row in own[batch])
                what = f"{kind}, batch {batch}: least ratio to cuBLAS"
                targets.append(Target.at_least(what, promised, least))
        if kind == "bfloat16" and own[1]:
            share = min(row["share"] for row in own[1])
            what = "bfloat16, batch 1: least share of what reading reaches"
            targets.append(Target.at_least(what, _PROMISED_SHARE, share))
        every = [row["ratio"] for row in rows if row["side"] == kind]
        if every:
            what = f"{kind}, every batch: least ratio to cuBLAS"
            targets.append(Target.at_least(what, 1.0, min(every)))
    dense = {shape_of(row): row["median_s"] for row in rows
             if (row["side"], row["batch"]) == ("dense int4", 1)}  # fmt: skip
    ours = {shape_of(row): row["median_s"] for row in rows
            if (row["side"], row["batch"]) == ("int4", 1)}  # fmt: skip
    ratios = [dense[shape] / ours[shape] for shape in dense.keys() & ours.keys()]
    if ratios:
        what = "int4, batch 1: least ratio to torch's dense INT4"
        targets.append(Target.at_least(what, 1.0, min(ratios)))
    return targets
