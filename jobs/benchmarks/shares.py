"""How a product of few tokens is best shared out among a GPU's warps, beside what is chosen.

`sparsify.kernels.cuda.decode.plan_of` has a table of such shares, made by this command on one card.
On another card, or for layers of other shapes, it says what the table costs there.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from jobs.benchmarks.support.arguments import add_option, settings_of
from jobs.benchmarks.support.linear_sides_cuda import (
    GROUP_SIZE,
    Side,
    elapsed_s,
    random_prepared,
    read_bytes_per_s,
    recorded,
)
from jobs.benchmarks.support.record import Outcome, Table, Target
from sparsify.errors import InputError
from sparsify.kernels.cuda import decode
from sparsify.kernels.cuda.layout import COLUMNS, KINDS, ROWS, Prepared
from sparsify.kernels.triton_jit import require_triton

SUMMARY = "how few tokens by a packed layer are best shared out on this GPU"

EXAMPLES = ("shares", "shares --shapes 5120x5120 --tokens 1 --kinds int4")

_SHAPES = ("1024x4096", "4096x4096", "14336x4096", "4096x14336", "28672x8192")

_PROMISED = 0.9


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    shapes = "layers: ROWSxCOLUMNS"
    add_option(parser, "--shapes", list(_SHAPES), shapes, nargs="+", metavar="ROWSxCOLUMNS")
    add_option(parser, "--tokens", [1, 8, 16], "tokens at once", nargs="+", metavar="N")
    kinds = f"packed values: {', '.join(KINDS)}"
    add_option(parser, "--kinds", ["bfloat16", "int4"], kinds, nargs="+", metavar="KIND")


def run(options: Namespace) -> Outcome:
    """Compile every share in processes side by side, then time one after another.

    Raises:
        InputError: no GPU, or what the kernels do not have.
    """
    require_triton()
    if not torch.cuda.is_available():
        raise InputError("shares: there is no GPU here; its shares can be timed only there")
    tokens = [int(number) for number in options.tokens]
    if not all(1 <= number <= decode.MOST_TOKENS for number in tokens):
        raise InputError(f"--tokens: write numbers from 1 to {decode.MOST_TOKENS}")
    cases = []
    for text, kind, number in itertools.product(options.shapes, options.kinds, tokens):
        rows, cut, columns = text.partition("x")
        if not (cut and rows.isdigit() and columns.isdigit()) or kind not in KINDS:
            raise InputError(f"--shapes {text}, --kinds {kind}: write 4096x4096, and known kinds")
        cases.append((kind, int(rows), int(columns), number))
    num_processes = max(1, min(14, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, [(case, plan) for case in cases for plan in plans_of(*case)]))
    rate = read_bytes_per_s()
    found = [_measure(case, rate) for case in cases]
    least = min(row["fastest_s"] / row["chosen_s"] for row in found)
    lines = [
        (
            f"{row['rows']} x {row['columns']}, {row['kind']}, {row['tokens']} tokens",
            f"{1e6 * row['chosen_s']:.1f}", f"{1e6 * row['fastest_s']:.1f}", str(row["fastest"]),
            f"{100 * row['share']:.0f} %",
        )
        for row in found
    ]  # fmt: skip
    table = Table(
        ("layer", "chosen, us", "fastest, us", "plan of the fastest", "of reading"), lines
    )
    settings = settings_of(options, "shapes", "tokens", "kinds")
    settings["card"] = torch.cuda.get_device_name()
    targets = [Target.at_least("fastest over chosen, worst case", _PROMISED, least)]
    notes = ["times are of CUDA graphs over copies of the weight, four level-2 caches together"]
    return Outcome(
        "cuda", torch.get_num_threads(), settings, {"layers": found}, [table], targets, notes
    )


def plans_of(kind: str, rows: int, columns: int, tokens: int) -> list[decode.Plan]:
    """Shares worth a try: those that divide the weight and fit a lane's registers."""
    row_tiles, steps = -(-rows // ROWS), -(-columns // COLUMNS)
    chosen = decode.plan_of(tokens, row_tiles, steps, kind)
    most_words = 2 if kind in ("bfloat16", "float16") else 4
    found = [chosen]
    for tiles, row_warps, step_warps, unrolled in itertools.product(
        (1, 2, 4), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4)
    ):
        fits = tiles * unrolled <= most_words and 2 <= row_warps * step_warps <= 8
        if fits and not row_tiles % (tiles * row_warps) and step_warps * unrolled <= steps:
            shared = (chosen.token_tiles, tiles, row_warps, step_warps, unrolled)
            found.append(decode.Plan(*shared, chosen.is_arranged))
    return list(dict.fromkeys(found))


def _size(kind: str) -> int:
    return GROUP_SIZE if kind in ("int8", "int4", "nf4") else 0


def _call(
    prepared: Prepared, kind: str, rows: int, plan: decode.Plan
) -> Callable[[Tensor], Tensor]:
    return lambda x: decode.decode(x, prepared, None, kind, rows, _size(kind), plan=plan)


def _compile(job: tuple[tuple[str, int, int, int], decode.Plan]) -> None:
    (kind, rows, columns, tokens), plan = job
    prepared = random_prepared(kind, rows, columns, _size(kind))
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    _call(prepared, kind, rows, plan)(x)
    torch.cuda.synchronize()


def _measure(case: tuple[str, int, int, int], rate: float) -> dict[str, Any]:
    kind, rows, columns, tokens = case
    prepared = random_prepared(kind, rows, columns, _size(kind))
    num_bytes = sum(tensor.nbytes for tensor in prepared if tensor is not None)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = [
        Prepared(*(None if tensor is None else tensor.clone() for tensor in prepared))  # type: ignore[arg-type]
        for _ in range(max(2, -(-4 * cache // num_bytes)))
    ]
    torch.cuda.synchronize()
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    times_s: dict[decode.Plan, float] = {}
    for plan in plans_of(*case):
        calls = [_call(own, kind, rows, plan) for own in copies]
        graph = recorded(Side(num_bytes, calls), x)
        graph.replay()
        times_s[plan] = min(elapsed_s(graph.replay, 2) for _ in range(3)) / len(copies)
    chosen, fastest = plans_of(*case)[0], min(times_s, key=lambda plan: times_s[plan])
    return {
        "kind": kind, "rows": rows, "columns": columns, "tokens": tokens, "num_bytes": num_bytes,
        "chosen": list(chosen), "chosen_s": times_s[chosen], "fastest": list(fastest),
        "fastest_s": times_s[fastest], "share": num_bytes / times_s[chosen] / rate,
        "times": [[*plan, seconds] for plan, seconds in times_s.items()],
    }  # fmt: skip
