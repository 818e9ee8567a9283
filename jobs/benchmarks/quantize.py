"""Schemes, group sizes and methods on one sparse model: what each costs in quality and size."""

from __future__ import annotations

import copy
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.options.data import DataConfig
from jobs.benchmarks.support.arguments import add_calibration, add_option, settings_of
from jobs.benchmarks.support.record import Outcome, Table
from jobs.corpus.rows import load_rows
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.evaluation.perplexity import evaluate_rows
from sparsify.files import resolve_path
from sparsify.formats.sparse_folder import read_sparsity
from sparsify.formats.verify import masks_of
from sparsify.methods import PruneParams, get_method
from sparsify.models.load import load_pair
from sparsify.packed.layer import packed_num_bytes
from sparsify.packed.layout import Scheme
from sparsify.params import QuantParams
from sparsify.pattern import Pattern
from sparsify.pruning.prune import prune_model
from sparsify.quantization import quantize_model
from sparsify.quantization.schemes import get_scheme

SUMMARY = "what quantisation costs in perplexity and saves in bytes: schemes, groups, methods"

EXAMPLES = (
    "quantize --model runs/embedded-2-4-twofour/distill/model",
    "quantize --model DENSE_MODEL --text stories.txt --only int4",
)

PATTERN = "2:4"

VARIANTS = {
    "int4, nearest, groups of 128": QuantParams("rtn", group_size=128),
    "int4, gptq alone, groups of 128": QuantParams(
        group_size=128, num_refine_sweeps=0, teacher_share=0.0
    ),
    "int4, groups of 128": QuantParams(group_size=128),
    "int4, groups of 64": QuantParams(group_size=64),
    "int4, groups of 32": QuantParams(group_size=32),
    "int4, a channel": QuantParams(group_size=-1),
    "int4, zero points, groups of 128": QuantParams(group_size=128, symmetric=False),
    "int4, zero points, groups of 32": QuantParams(group_size=32, symmetric=False),
    "nf4": QuantParams(scheme="nf4"),
    "int8": QuantParams(scheme="int8"),
    "fp8": QuantParams(scheme="fp8"),
}
"""rows of the table -> what they are made with"""

_NOTES = (
    "perplexity added and KL are measured against the same sparse model before it was quantised",
    "bits: of a packed layer for each weight of the dense one, positions and scales included",
    "a model without sparsity.json is pruned to 2:4 here first (twofour, no recovery, no rotation)",
    "activations are not rounded; seconds are of one process, walk over the blocks included",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_option(parser, "--model", "embedded", "folder of a sparse model, or of a dense one")
    add_option(parser, "--text", "stdlib", "source of calibration and held-out rows")
    add_calibration(parser, samples=256, length=256, batch_size=16)
    add_option(parser, "--heldout-tokens", 65536, "tokens that are scored")
    add_option(parser, "--only", "", "rows whose name begins so")


def run(options: Namespace) -> Outcome:
    """Quantise the model in every way, and score each beside the model as it was.

    Raises:
        InputError: a model that cannot be read, or a text with too few rows.
    """
    torch.set_num_threads(1)
    folder = resolve_path(options.model)
    model, tokenizer = load_pair(folder, "float32", "cpu")
    data = DataConfig(calibration=options.text, sequence_length=options.length)
    rows, _ = load_rows(data, "calibration", tokenizer, options.samples, options.seed)
    num_held = options.heldout_tokens // options.length
    held, _ = load_rows(data, "heldout", tokenizer, num_held, options.seed)
    masks = _masks(folder, model, rows, options.batch_size)
    before = evaluate_rows(model, held, options.batch_size, model).perplexity
    print(f"before quantisation: perplexity {before:.4f}", flush=True)
    figures: dict[str, Any] = {"perplexity": before}
    for name, params in VARIANTS.items():
        if name.startswith(options.only):
            figures[name] = measure(model, rows, held, masks, params, options.batch_size)
            added = figures[name]["perplexity"] / before - 1
            print(f"{name}: {added:+.2%}", flush=True)
    settings = settings_of(options, "model", "text", "samples", "length", "heldout_tokens", "seed")
    return Outcome("cpu", 1, settings, figures, [table_of(figures)], notes=list(_NOTES))


def measure(
    model: Any, rows: TokenRows, held: TokenRows, masks: dict[str, Tensor], params: QuantParams,
    batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """Scores, bits a weight and seconds of one way to quantise."""
    changed = copy.deepcopy(model)
    started_s = time.perf_counter()
    quantize_model(changed, rows, masks, params, comm=Comm.single(), batch_size=batch_size)
    seconds = time.perf_counter() - started_s
    score = evaluate_rows(changed, held, batch_size, model)
    layers = {f"{name}.weight": changed.get_submodule(name).weight for name in masks}
    scheme = get_scheme(params.scheme)
    num_bytes = sum(
        _bytes(name, weight, scheme.stored_as(params, weight.shape[1]))
        for name, weight in layers.items()
    )
    num_weights = sum(weight.numel() for weight in layers.values())
    return {
        "perplexity": score.perplexity,
        "kl": score.kl,
        "bits": 8 * num_bytes / num_weights,
        "seconds": seconds,
        "params": asdict(params),
    }


def _bytes(name: str, weight_OI: Tensor, scheme: Scheme) -> int:
    pattern = Pattern.parse(PATTERN)
    return packed_num_bytes({name: weight_OI}, [name.removesuffix(".weight")], pattern, scheme)


def _masks(folder: Path, model: Any, rows: TokenRows, batch_size: int) -> dict[str, Tensor]:
    """Keep masks of the model, which is pruned here if it is not."""
    if read_sparsity(folder) is not None:
        return dict(masks_of(folder, model, PATTERN)[0])
    result = prune_model(
        model, rows, get_method("twofour"), Pattern.parse(PATTERN), PruneParams(),
        comm=Comm.single(), memory=Memory(batch_size),
    )  # fmt: skip
    return result.keep_masks


def table_of(figures: dict[str, Any]) -> Table:
    """A row for each way to quantise."""
    before = figures["perplexity"]
    rows = [
        [
            name, f"{found['perplexity'] / before - 1:+.2%}", f"{1e3 * found['kl']:.2f}",
            f"{found['bits']:.2f}", f"{found['seconds']:.1f}",
        ]
        for name, found in figures.items() if name != "perplexity"
    ]  # fmt: skip
    return Table(["", "perplexity", "KL, 1e-3 nats", "bits a weight", "seconds"], rows)
