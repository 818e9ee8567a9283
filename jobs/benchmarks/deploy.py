"""Packed 2:4 weights as they are deployed, compared with dense ones: layers, and a whole model.

Each shape is timed with random weights for dense float32, bfloat16 and INT4 by torch, and for each
kind of packed values by this project's kernel. What a layer reads is put beside what a loop that
only reads reaches in the same run, with the same threads and the same instructions. A random
model in transformers says what comes of it with attention, norms and the dense head around.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.benchmarks.support import deploy_cuda
from jobs.benchmarks.support.arguments import add_device, add_option, settings_of
from jobs.benchmarks.support.device import use_device
from jobs.benchmarks.support.linear_sides import Side, dense_int4, dense_linear, packed
from jobs.benchmarks.support.linear_tables import mean_ratios, ratio_table, shape_of
from jobs.benchmarks.support.record import Chart, Outcome, Table, Target
from jobs.benchmarks.support.whole_model import (
    NOTES,
    SETTINGS,
    add_model_arguments,
    check_model,
    measure_model,
    model_chart,
    model_tables,
    model_targets,
)
from sparsify.errors import InputError
from sparsify.kernels.cpu.layout import KINDS
from sparsify.kernels.cpu.library import PATHS, library

SUMMARY = "packed 2:4 layers and models compared with dense ones, per shape and batch"

EXAMPLES = ("deploy --device cpu --save", "deploy --device cuda --save")

_SHAPES = {
    "8b": ("1024x4096", "4096x4096", "6144x4096", "14336x4096", "28672x4096", "4096x14336"),
    "70b": ("1024x8192", "8192x8192", "10240x8192", "28672x8192", "57344x8192", "8192x28672"),
}
"""k and v, q and o, q with k and v, gate or up, both, down; of Llama 3.1"""

_DENSE = ("dense float32", "dense bfloat16", "dense int4")

_BATCHES = (1, 2, 4, 8, 16, 64)

_MOST_BATCH = 16  # of the promise that nothing is slower than dense

_PROMISED = {"int4": 3.0, "bfloat16": 1.4}

_PROMISED_SHARE = 0.6

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")

_NOTES = (
    "times (wall, or work of all threads over their number) are medians over rounds in which the "
    "sides take turns, of calls from Python; every side uses several copies of its weight "
    "in turn, twice the last cache together",
    "inputs are float32; torch's bfloat16 and INT4 get theirs cast, which is timed too",
    "ratio: the faster of torch's float32 and bfloat16, over this; share: bytes of the weight a "
    "second over what a loop that only reads reaches with as many threads in the same rounds",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_device(parser)
    shapes = "8b, 70b (layers of Llama 3.1), ROWSxCOLUMNS, or none"
    add_option(parser, "--shapes", ["8b"], shapes, nargs="+", metavar="SHAPE")
    add_option(parser, "--batches", list(_BATCHES), "tokens at once", nargs="+", metavar="N")
    kinds = f"packed values: {', '.join(KINDS)}"
    default = ["bfloat16", "int8", "float8", "int4", "nf4"]
    add_option(parser, "--kinds", default, kinds, nargs="+", metavar="KIND")
    add_option(parser, "--path", "auto", f"auto, torch, {', '.join(PATHS)}")
    clock = "wall, or work of all threads: less disturbed where much else runs"
    add_option(parser, "--clock", "wall", clock, choices=["wall", "work"])
    add_option(parser, "--repeats", 5, "rounds; the median counts")
    add_option(parser, "--seed", 0, "random weights and inputs")
    add_model_arguments(parser)


def run(options: Namespace) -> Outcome:
    """Time every side on every shape and batch, with one thread and with all that were asked for.

    Raises:
        InputError: a shape, batch or kind that cannot be read, or a device without kernels here.
    """
    num_threads = use_device(options)
    torch.manual_seed(options.seed)
    shapes, batches = _shapes(options.shapes), _batches(options.batches)
    check_model(options)
    if options.device == "cuda":
        return deploy_cuda.run(options, shapes, batches)
    for kind in options.kinds:
        if kind not in KINDS:
            raise InputError(f"--kinds {kind}: unknown; use one of: {', '.join(KINDS)}")
    measured = []
    for rows, columns in shapes:
        sides = _sides(rows, columns, options.kinds, options.path)
        for threads in sorted({1, num_threads}):
            torch.set_num_threads(threads)
            for batch in batches:
                print(f"{rows} x {columns}, batch {batch}, {threads} thread(s)", flush=True)
                measured += measure(sides, rows, columns, batch, threads, options)
        torch.set_num_threads(num_threads)
    settings = settings_of(
        options, "shapes", "batches", "kinds", "path", "clock", "repeats", "seed", *SETTINGS
    )
    found = library()
    settings["best_path"] = found.paths[-1] if found else "torch"
    whole = [] if options.model == "none" else measure_model(options, num_threads)
    return summarise(measured, settings, num_threads, whole)


def _sides(rows: int, columns: int, kinds: list[str], path: str) -> dict[str, Side]:
    """Name -> side. Engines of others, or whole models, would be sides of files like these."""
    least_bytes = 2 * _cache_bytes()
    sides = {
        "dense float32": dense_linear(torch.float32, rows, columns, least_bytes),
        "dense bfloat16": dense_linear(torch.bfloat16, rows, columns, least_bytes),
    }
    if columns % 128 == 0 and rows % 16 == 0:  # what torch's kernel takes
        sides["dense int4"] = dense_int4(rows, columns, least_bytes)
    for kind in kinds:
        sides[kind] = packed(kind, rows, columns, least_bytes, path)
    return sides


def measure(
    sides: dict[str, Side], rows: int, columns: int, batch: int, threads: int, options: Namespace
) -> list[dict[str, Any]]:
    """Median seconds of a call of each side; in each round they take turns."""
    inputs_TI = torch.randn(batch, columns)
    buffer = torch.empty(2 * _cache_bytes(), dtype=torch.uint8).random_()
    taken_s: dict[str, list[float]] = {name: [] for name in sides}
    read_s = []
    clock = time.perf_counter if options.clock == "wall" else lambda: time.process_time() / threads
    for _ in range(options.repeats + 1):
        read_s.append(_read_s(buffer, threads, clock))
        for name, side in sides.items():
            taken_s[name].append(_call_s(side, inputs_TI, clock))
    read_rate = buffer.nbytes / statistics.median(read_s[1:])
    median_s = {name: statistics.median(times[1:]) for name, times in taken_s.items()}
    dense_s = min(median_s["dense float32"], median_s["dense bfloat16"])
    return [
        {
            "rows": rows, "columns": columns, "batch": batch, "threads": threads, "side": name,
            "median_s": seconds, "fastest_s": min(taken_s[name][1:]), "ratio": dense_s / seconds,
            "num_bytes": sides[name].num_bytes, "bytes_per_s": sides[name].num_bytes / seconds,
            "read_bytes_per_s": read_rate, "share": sides[name].num_bytes / seconds / read_rate,
        }
        for name, seconds in median_s.items()
    ]  # fmt: skip


def _call_s(side: Side, inputs_TI: Tensor, clock: Callable[[], float]) -> float:
    """Seconds of a call: the mean of as many as take 2 ms, so that small layers are seen too."""
    num_calls, started_s = 0, clock()
    while (taken_s := clock() - started_s) < 2e-3 or not num_calls:
        side.run(inputs_TI)
        num_calls += 1
    return taken_s / num_calls


def _read_s(buffer: Tensor, threads: int, clock: Callable[[], float]) -> float:
    """Seconds in which the best instructions here read the buffer; torch's sum without them."""
    found = library()
    started_s = clock()
    if found is None:
        buffer.view(torch.int64).sum()
    else:
        found.handle.twofour_read(buffer.data_ptr(), buffer.nbytes, threads, found.best)
    return clock() - started_s


def summarise(
    measured: list[dict[str, Any]], settings: dict[str, Any], num_threads: int,
    whole: list[dict[str, Any]],
) -> Outcome:  # fmt: skip
    """Tables by threads: time ratios by batch, and the memory's share at the smallest batch."""
    batches = sorted({row["batch"] for row in measured})
    tables = []
    for threads in sorted({row["threads"] for row in measured}):
        some = [row for row in measured if row["threads"] == threads]
        tables += [
            ratio_table(some, batches, f"ratio, {threads} thread(s)"),
            _memory_table(some, batches[0], threads),
        ]
    targets = [*_targets(measured), *model_targets(whole)]
    curves: dict[str, Sequence[float | None]] = {**mean_ratios(measured, batches)}
    chart = Chart(
        "Speed over the faster of torch's float32 and bfloat16 (mean over shapes and threads)",
        "tokens at once", batches, curves,
    )  # fmt: skip
    summary: dict[str, Any] = {
        "ratio_at_1": {name: round(values[0] or 0.0, 3) for name, values in curves.items()},
        "targets_met": sum(target.is_met for target in targets),
        "targets": len(targets),
    }
    charts: list[Chart] = [chart] if measured else []
    if whole:
        tables += model_tables(whole)
        charts.append(model_chart(whole))
        summary["tokens_per_s_at_1"] = {
            side["side"]: round(1 / row["token_s"], 3)
            for side in whole
            for row in side["rows"]
            if (row["batch"], row["threads"]) == (1, num_threads)
        }
    return Outcome(
        "cpu", num_threads, settings, {"layers": measured, "model": whole}, tables, targets,
        [*(_NOTES if measured else ()), *(NOTES if whole else ())], next(iter(charts), None),
        summary, charts[1:],
    )  # fmt: skip


def _memory_table(rows: list[dict[str, Any]], batch: int, threads: int) -> Table:
    """Time, bytes a second, and their share of the read-only loop's."""
    lines = [
        (
            f"{shape_of(row)}, {row['side']}", f"{1e3 * row['median_s']:.3f}",
            f"{row['num_bytes'] / 1e6:.1f}", f"{row['bytes_per_s'] / 1e9:.1f}",
            f"{100 * row['share']:.0f} %", f"{row['ratio']:.2f}",
        )
        for row in rows
        if row["batch"] == batch
    ]  # fmt: skip
    name = f"batch {batch}, {threads} thread(s)"
    return Table((name, "ms", "MB", "GB/s", "of the loop", "ratio"), lines)


def _targets(rows: list[dict[str, Any]]) -> list[Target]:
    """What was promised of int4 and bfloat16, at the worst shape and number of threads."""
    targets = []
    for kind, promised in _PROMISED.items():
        first = [row for row in rows if row["side"] == kind and row["batch"] == 1]
        few = [row for row in rows if row["side"] == kind and row["batch"] <= _MOST_BATCH]
        if first:
            least = min(row["ratio"] for row in first)
            targets.append(Target.at_least(f"{kind}, batch 1: least ratio", promised, least))
            share = min(row["share"] for row in first)
            what = f"{kind}, batch 1: least share of the read-only loop"
            targets.append(Target.at_least(what, _PROMISED_SHARE, share))
        if few:
            least = min(row["ratio"] for row in few)
            what = f"{kind}, batch 1 to {_MOST_BATCH}: least ratio"
            targets.append(Target.at_least(what, 1.0, least))
    return targets


def _cache_bytes() -> int:
    """Bytes of the last cache; 64 MiB where the system does not say."""
    try:
        return int(_CACHE.read_text(encoding="utf-8").strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 64 * 2**20


def _batches(texts: list[Any]) -> list[int]:
    for text in texts:
        if not str(text).isdigit() or int(text) < 1:
            raise InputError(f"--batches {text}: write numbers of tokens, such as 1 16")
    return sorted({int(text) for text in texts})


def _shapes(texts: list[str]) -> list[tuple[int, int]]:
    """(rows, columns) of every shape that was named."""
    shapes: list[tuple[int, int]] = []
    if texts == ["none"]:
        return shapes
    for text in (one for name in texts for one in _SHAPES.get(name.lower(), (name,))):
        parts = text.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise InputError(f"--shapes {text}: write 8b, 70b, ROWSxCOLUMNS or none")
        rows, columns = map(int, parts)
        if columns % 8:
            raise InputError(f"--shapes {text}: columns must be a multiple of 8")
        shapes.append((rows, columns))
    return shapes
