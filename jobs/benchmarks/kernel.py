"""What goes over the columns of a layer, SparseGPT's sweep and GPTQ, compared with plain loops over
single columns.

Shape suffixes: O output features (rows), I input features (columns), B columns of one block.
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from jobs.benchmarks.support.arguments import add_device, add_option, settings_of
from jobs.benchmarks.support.device import use_device, wall_s
from jobs.benchmarks.support.record import Outcome, Table, Target
from sparsify.calibration.hessian import row_energies
from sparsify.errors import InputError
from sparsify.kernels.sweep import sweep
from sparsify.masks.select import keep_mask_from_scores
from sparsify.params import QuantParams
from sparsify.pattern import Pattern
from sparsify.quantization.codes import per_column
from sparsify.quantization.gptq import Inputs, gptq
from sparsify.quantization.levels import Levels
from sparsify.quantization.schemes import Grid, get_scheme

SUMMARY = "the sweep over a layer's columns and GPTQ compared with plain column loops"

EXAMPLES = ("kernel --device cuda --save", "kernel --device cuda --loops gptq --schemes int4 nf4")

_T = TypeVar("_T")

_TARGET_RATIO = 20.0

_LAYERS = {
    "q_proj, o_proj": (4096, 4096),
    "k_proj, v_proj": (1024, 4096),
    "gate_proj, up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}

_NOTES = (
    "block: the first block of columns alone; layer: all columns with the products between blocks",
    "the reference is the loop over columns of the paper's algorithm 1 as it is commonly written, "
    "without a kernel",
    "times are the fastest of the repeats; weights and factor are random",
    "GPTQ: all columns, the descent's sweeps included; the reference is this project's own loop in "
    "PyTorch, which is what CPUs run; equal codes: the rest of a row changes with its first tie",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_device(parser)
    shapes = "shapes of layers (default: those of Llama 3.1 8B)"
    add_option(parser, "--shapes", None, shapes, nargs="+", metavar="ROWSxCOLUMNS")
    add_option(parser, "--block-size", 128, "columns of a block")
    part = "time one block of columns, the whole layer, or both"
    add_option(parser, "--part", "both", part, choices=["block", "layer", "both"])
    loops = "SparseGPT's sweep, GPTQ, or both"
    add_option(parser, "--loops", "both", loops, choices=["sweep", "gptq", "both"])
    add_option(parser, "--schemes", ["int4"], "what GPTQ rounds to", nargs="+")
    add_option(parser, "--repeats", 3, "runs; the fastest counts")
    add_option(parser, "--seed", 0, "random weights")


def run(options: Namespace) -> Outcome:
    """Time both sides on every shape, and compare their masks and codes.

    Raises:
        InputError: no GPU, or a shape or a scheme that cannot be read.
    """
    num_threads = use_device(options)
    torch.backends.cuda.matmul.allow_tf32 = False
    parts = ("block", "layer") if options.part == "both" else (options.part,)
    schemes = [QuantParams(scheme=get_scheme(name).name) for name in options.schemes]
    measured, quantized = [], []
    for name, (num_rows, num_columns) in _shapes(options.shapes).items():
        for part in parts if options.loops != "gptq" else ():
            columns = options.block_size if part == "block" else num_columns
            print(f"{name}: {num_rows} x {columns}", flush=True)
            figures = measure(
                num_rows, columns, options.block_size, options.repeats, options.seed, options.device
            )
            measured.append({"layer": name, "part": part, "rows": num_rows, **figures})
        for params in schemes if options.loops != "sweep" else ():
            print(f"{name}: gptq, {params.scheme}", flush=True)
            shape = (num_rows, num_columns)
            figures = measure_gptq(shape, params, options.repeats, options.seed, options.device)
            quantized.append({"layer": name, "rows": num_rows, **figures})
    settings = settings_of(options, "block_size", "repeats", "seed")
    outcome = summarise(measured, settings, options.device, num_threads)
    return with_gptq(outcome, quantized) if quantized else outcome


def measure(
    num_rows: int, num_columns: int, block_size: int, repeats: int, seed: int, device: str
) -> dict[str, Any]:
    """Seconds of both sweeps over a random weight, and the share of equal 2:4 groups."""
    pattern = Pattern.parse("2:4")
    generator = torch.Generator(device).manual_seed(seed)
    weight_OI = torch.randn(num_rows, num_columns, generator=generator, device=device)
    # Any upper triangle with a positive diagonal is the factor of some Hessian.
    upper_II = torch.randn(num_columns, num_columns, generator=generator, device=device).triu_(1)
    upper_II *= 0.3 / num_columns**0.5
    upper_II.diagonal().uniform_(0.5, 1.5, generator=generator)

    ours_s, ours_OI = _fastest(
        lambda: sweep(weight_OI, upper_II, pattern, block_size)[0], repeats, device
    )
    theirs_s, theirs_OI = _fastest(
        lambda: column_loop(weight_OI, upper_II, block_size), repeats, device
    )
    equal = ((ours_OI != 0) == (theirs_OI != 0)).reshape(-1, 4).all(1)
    return {
        "columns": num_columns,
        "twofour_s": ours_s,
        "column_loop_s": theirs_s,
        "ratio": theirs_s / ours_s,
        "mask_agreement": float(equal.float().mean()),
    }


def measure_gptq(
    shape: tuple[int, int], params: QuantParams, repeats: int, seed: int, device: str
) -> dict[str, Any]:
    """Seconds of GPTQ over a random 2:4 weight with kernels and without, and how far both agree."""
    generator = torch.Generator(device).manual_seed(seed)
    num_columns = shape[1]
    weight_OI = torch.randn(shape, generator=generator, device=device)
    keep_OI = keep_mask_from_scores(weight_OI.abs(), Pattern.parse("2:4"))
    inputs_TI = torch.randn(2 * num_columns, num_columns, generator=generator, device=device)
    hessian_II = inputs_TI.T @ inputs_TI / len(inputs_TI)
    scheme = get_scheme(params.scheme)
    size, grid = scheme.group_size_of(params, num_columns), scheme.grid(params)
    inputs = Inputs.of(hessian_II, None, size, params.damping, "layer")
    target_OI = weight_OI.masked_fill(~keep_OI, 0.0)
    without_kernels = copy.copy(grid)
    without_kernels.rounding = None

    def solve(grid: Grid) -> Levels:
        return gptq(target_OI, keep_OI, inputs, grid, size, params)

    ours_s, ours = _fastest(lambda: solve(grid), repeats, device)
    theirs_s, theirs = _fastest(lambda: solve(without_kernels), repeats, device)
    errors = [
        float(row_energies(target_OI - _weight(found, size), hessian_II).sum(dtype=torch.float64))
        for found in (ours, theirs)
    ]
    return {
        "columns": num_columns,
        "scheme": params.scheme,
        "twofour_s": ours_s,
        "column_loop_s": theirs_s,
        "ratio": theirs_s / ours_s,
        "code_agreement": float((ours.levels_OI == theirs.levels_OI).float().mean()),
        "scale_agreement": float((ours.scales_OG == theirs.scales_OG).float().mean()),
        "error_ratio": errors[0] / errors[1],
    }


def _weight(levels: Levels, group_size: int) -> Tensor:
    num_columns = levels.levels_OI.shape[1]
    return levels.levels_OI * per_column(levels.scales_OG, group_size, num_columns)


def _fastest(step: Callable[[], _T], repeats: int, device: str) -> tuple[float, _T]:
    """Least seconds of `step`, after one run that does not count, and what it returned."""
    result, taken_s = step(), []
    for _ in range(repeats):
        started_s = wall_s(device)
        result = step()
        taken_s.append(wall_s(device) - started_s)
    return min(taken_s), result


def column_loop(weight_OI: Tensor, upper_II: Tensor, block_size: int) -> Tensor:
    """2:4 SparseGPT, one column after another (arXiv:2301.00774, Algorithm 1); the pruned weight.

    In each block of columns: at every fourth column the two lowest of w^2 / U_jj^2 of the group
    are chosen; each column's error moves to the columns of the block to its right; the columns
    after the block receive the block's errors in one product.
    """
    work_OI = weight_OI.clone()
    num_columns = work_OI.shape[1]
    for start in range(0, num_columns, block_size):
        stop = min(start + block_size, num_columns)
        block_OB = work_OI[:, start:stop].clone()
        pruned_OB = torch.zeros_like(block_OB)
        error_OB = torch.zeros_like(block_OB)
        is_pruned_OB = torch.zeros_like(block_OB, dtype=torch.bool)
        upper_BB = upper_II[start:stop, start:stop]
        for column in range(stop - start):
            if column % 4 == 0:
                group = slice(column, column + 4)
                score_O4 = block_OB[:, group] ** 2 / upper_BB.diagonal()[group] ** 2
                lowest_O2 = score_O4.topk(2, dim=1, largest=False).indices
                is_pruned_OB.scatter_(1, column + lowest_O2, True)
            weight_O = block_OB[:, column]
            kept_O = weight_O.masked_fill(is_pruned_OB[:, column], 0.0)
            error_O = (weight_O - kept_O) / upper_BB[column, column]
            block_OB[:, column:] -= error_O.unsqueeze(1) @ upper_BB[column, column:].unsqueeze(0)
            pruned_OB[:, column] = kept_O
            error_OB[:, column] = error_O
        work_OI[:, start:stop] = pruned_OB
        work_OI[:, stop:] -= error_OB @ upper_II[start:stop, stop:]
    return work_OI


def summarise(
    measured: list[dict[str, Any]], settings: dict[str, Any], device: str, num_threads: int
) -> Outcome:
    """Table and target: on a GPU, every block has to reach the ratio."""
    rows = [
        (
            f"{row['layer']} ({row['part']})", f"{row['rows']} x {row['columns']}",
            f"{1e3 * row['twofour_s']:.2f} ms", f"{1e3 * row['column_loop_s']:.2f} ms",
            f"{row['ratio']:.2f}", f"{100 * row['mask_agreement']:.4f} %",
        )
        for row in measured
    ]  # fmt: skip
    headings = ("layer", "shape", "twofour", "column loop", "ratio", "equal groups")
    blocks = [row["ratio"] for row in measured if row["part"] == "block"]
    targets = []
    if device == "cuda" and blocks:
        targets.append(Target.at_least("block, least ratio", _TARGET_RATIO, min(blocks)))
    figures = {"layers": measured}
    tables = [Table(headings, rows)] if rows else []
    return Outcome(device, num_threads, settings, figures, tables, targets, list(_NOTES))


def with_gptq(outcome: Outcome, quantized: list[dict[str, Any]]) -> Outcome:
    """Its table and targets beside those of the sweep."""
    rows = [
        (
            f"{row['layer']} ({row['scheme']})", f"{row['rows']} x {row['columns']}",
            f"{1e3 * row['twofour_s']:.1f} ms", f"{1e3 * row['column_loop_s']:.1f} ms",
            f"{row['ratio']:.2f}", f"{100 * row['code_agreement']:.3f} %",
            f"{row['error_ratio']:.5f}",
        )
        for row in quantized
    ]  # fmt: skip
    headings = ("GPTQ", "shape", "twofour", "column loop", "ratio", "equal codes", "error, ratio")
    outcome.tables.append(Table(headings, rows))
    outcome.figures["gptq"] = quantized
    if outcome.device == "cuda":
        least, most = min(r["ratio"] for r in quantized), max(r["error_ratio"] for r in quantized)
        outcome.targets.append(Target.at_least("GPTQ, least ratio", _TARGET_RATIO, least))
        outcome.targets.append(Target.at_most("GPTQ, error over that of the loop", 1.001, most))
    return outcome


def _shapes(texts: list[str] | None) -> dict[str, tuple[int, int]]:
    """Name -> (rows, columns), from "4096x14336" or the Llama layers."""
    if texts is None:
        return _LAYERS
    shapes = {}
    for text in texts:
        parts = text.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise InputError(f"--shapes {text}: write ROWSxCOLUMNS, such as 4096x14336")
        rows, columns = map(int, parts)
        if columns % 4:
            raise InputError(f"--shapes {text}: columns must be a multiple of 4")
        shapes[text] = (rows, columns)
    return shapes
