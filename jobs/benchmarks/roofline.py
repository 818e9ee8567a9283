"""What a stage costs on a GPU that is not there: the code as it runs, counted, by a card's rates.

A step of recovery is in `support.roofline_recovery`, pruning here: some blocks of a model of the
shape are pruned on a stand-in (`support.stand_in_gpu`), and the whole model is worked out from them
as `bench model` does. With `--device cuda` the same is measured beside it.
"""

from __future__ import annotations

import itertools
import math
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

from jobs.benchmarks import model as measured_model
from jobs.benchmarks.support import roofline_recovery
from jobs.benchmarks.support.arguments import (
    add_calibration,
    add_device,
    add_option,
    add_shape,
    settings_of,
)
from jobs.benchmarks.support.device import use_device
from jobs.benchmarks.support.mixtures import MIXTURES, mixture_config
from jobs.benchmarks.support.random_llama import (
    SHAPES,
    check_blocks,
    llama_config,
    random_rows,
    write_checkpoint,
)
from jobs.benchmarks.support.record import Outcome, Table, Target
from jobs.benchmarks.support.roofline_recovery import add_recovery
from jobs.benchmarks.support.stand_in_comm import StandInComm
from jobs.benchmarks.support.stand_in_gpu import Spent, empty_model, stand_in_gpu, without_data
from jobs.benchmarks.support.stopwatch import mean_phases, phase_seconds
from jobs.workers.placement import ROOM_ON_GPU, Sizes
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.costs.cards import Card, find_card
from sparsify.costs.seconds import Rates, rates_of
from sparsify.errors import InputError
from sparsify.methods import PruneParams, get_method
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, prune_model

SUMMARY = "what a GPU would take to prune or recover: operations, bytes, launches, counted"

EXAMPLES = (
    "roofline --shape llama-3.1-8b --card h100 --method sparsegpt",
    "roofline --shape llama-3.1-8b --card h100 --method twofour",
    "roofline --shape llama-3.1-8b --card h100 --gpus 8",
    "roofline --shape qwen3-30b-a3b --card h100 --blocks 1",
    "roofline --stage recovery --card h100 --gpus 8",
)

_VOCABULARY = 4096

_CALIBRATION = ("samples", "length", "batch_size")

_DEFAULTS: dict[str, Any] = {
    "blocks": 3, "samples": 512, "length": 2048, "batch_size": 8, "method": "sparsegpt",
    "order": "auto", "disk_gb_s": 2.0,
}  # fmt: skip
"""options of pruning alone"""

_MOST_S = {"sparsegpt": 180.0, "twofour": 240.0}
"""of a Llama 3.1 8B with 512 rows of 2048 tokens on one H100"""

_LEAST_TIMES = {8: 6.0}
"""GPUs of one machine -> how many times as fast as one they are to be on that model"""

_NOTES = (
    "an operation takes the longer of its arithmetic and its bytes; the host starts one launch "
    "after another, and a wait lets it catch up; shares of a card's data sheet as "
    "sparsify/costs/seconds.py has them",
    "kernels of Triton count as what support/stand_in_gpu.py says they compute",
    "files: every weight read and written once at --disk-gb-s, the next block and "
    "the last one beside the block in hand (sparsify/models/blocks.py, calibration/checkpoint.py), "
    "so that the first read and the last write alone are waited for; checkpoints of the walk take "
    "at most a twentieth of its time; baselines, rotations, the gate and the record are not in it",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    stages = ["prune", "recovery"]
    add_option(parser, "--stage", "prune", "what is counted", choices=stages)
    add_shape(parser, "llama-3.1-8b", f"; to prune also {', '.join(MIXTURES)}")
    add_option(parser, "--card", "h100", "GPU that is stood in for, as jobs.plan names it")
    gpus = "GPUs; one is counted: for pruning, in one machine, the first, with the most to do"
    add_option(parser, "--gpus", 1, gpus)
    group: Any = parser.add_argument_group("of --stage prune")
    disk = "GB/s at which files are read and written"
    add_option(group, "--disk-gb-s", _DEFAULTS["disk_gb_s"], disk)
    add_option(group, "--blocks", _DEFAULTS["blocks"], "blocks that are counted")
    add_calibration(group, **{name: _DEFAULTS[name] for name in _CALIBRATION})
    add_option(group, "--method", _DEFAULTS["method"], "method")
    orders = ["auto", "layer", "block", "dense"]
    add_option(group, "--order", _DEFAULTS["order"], "prune.order", choices=orders)
    add_recovery(parser)
    add_device(parser, "cpu")


def run(options: Namespace) -> Outcome:
    """Count a stage: a step of recovery, or the pruning of some blocks.

    Raises:
        InputError: an unknown shape, card or method, or options that do not go together.
        TwofourError: see `stand_in_gpu`.
    """
    card = find_card(options.card, "--card")
    rates = rates_of(card, element_bytes=2)
    if options.gpus < 1 or (options.gpus > 1 and options.device == "cuda"):
        raise InputError(
            f"--gpus {options.gpus}: at least 1, and with --device cuda only 1 is measured"
        )
    others = _DEFAULTS if options.stage == "recovery" else roofline_recovery.DEFAULTS
    for name, value in others.items():
        if getattr(options, name) != value:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: means nothing to --stage {options.stage}; leave it out")
    num_threads = use_device(options)
    if options.stage == "recovery":
        return roofline_recovery.run(options, card, rates, num_threads)
    return _pruning(options, rates, num_threads)


def _pruning(options: Namespace, rates: Rates, num_threads: int) -> Outcome:
    """Count some blocks, and measure them where there is a GPU."""
    num_blocks, config = _config(options)
    if not options.disk_gb_s > 0:
        raise InputError(f"--disk-gb-s {options.disk_gb_s:g}: give a rate above 0")
    rates = replace(rates, disk=1e9 * options.disk_gb_s)
    get_method(options.method)
    print(f"{options.blocks} blocks of {options.shape}, counted for {options.card}", flush=True)
    typical = measured_model.typical_blocks(options.blocks)
    found, phases, block = _typical(config, options, rates, options.gpus)
    weights = empty_model(config).model.layers[-1].parameters()
    files_s = 2 * 2 * sum(weight.numel() for weight in weights) / rates.disk
    whole_s = whole_model_seconds(num_blocks, block["s"], files_s)
    figures: dict[str, Any] = {
        "phases": phases, "block": block, "kernels": found["kernels"], "files_s": files_s,
        "whole_model_s": whole_s,
    }  # fmt: skip
    alone_s = None
    if options.gpus > 1:
        alone = _typical(config, options, rates, 1)[2]
        alone_s = whole_model_seconds(num_blocks, alone["s"], files_s)
        figures["one_gpu_s"] = alone_s
    measured = None
    if isinstance(config, LlamaConfig) and options.device == "cuda":
        dense = options.workdir / f"model-{options.shape}-{options.blocks}-bfloat16"
        write_checkpoint(dense, config, options.seed, torch.bfloat16)
        rows_NT = random_rows(options.samples, options.length, _VOCABULARY, options.seed)
        measured = measured_model.measure(dense, "bfloat16", rows_NT, options, overlap=False)
        figures["measured"] = measured
    tables = [
        _phase_table(phases, block, measured, typical),
        _kernel_table(found["kernels"], options.blocks),
    ]
    parts = {
        "blocks": num_blocks * block["s"],
        "files": num_blocks * files_s,
        "whole model": whole_s,
    }
    if alone_s is not None:
        parts["whole model, one GPU"] = alone_s
    if measured is not None:
        blocks = measured["block_s"][typical]
        parts["blocks, measured"] = num_blocks * sum(blocks) / len(blocks)
    rows = [(name, f"{seconds:.1f} s") for name, seconds in parts.items()]
    if alone_s is not None:
        rows.append(("times as fast", f"{alone_s / whole_s:.2f}"))
    tables.append(Table((f"{num_blocks} blocks", "value"), rows))
    settings = settings_of(
        options, "shape", "card", "gpus", "disk_gb_s", "blocks", "samples", "length", "batch_size",
        "method", "order", "seed",
    )  # fmt: skip
    targets = []
    is_target = (options.shape, options.card, options.samples, options.length) == (
        "llama-3.1-8b", "h100", 512, 2048,
    )  # fmt: skip
    if is_target and options.method in _MOST_S:
        most_s = _MOST_S[options.method]
        targets.append(Target.at_most(f"s of {options.method}, files included", most_s, whole_s))
        if alone_s is not None and options.gpus in _LEAST_TIMES:
            least, what = _LEAST_TIMES[options.gpus], "times as fast as one GPU, files included"
            targets.append(Target.at_least(what, least, alone_s / whole_s))
    return Outcome(
        options.device, num_threads, settings, figures, tables, targets, list(_NOTES),
        summary={"whole_model_s": round(whole_s, 1)},
    )  # fmt: skip


def _config(options: Namespace) -> tuple[int, PretrainedConfig]:
    """How many blocks the shape has, and the configuration of those that are counted."""
    num_blocks = check_blocks(options.shape, options.blocks, "--blocks", SHAPES | MIXTURES)
    sizes = MIXTURES.get(options.shape)
    if sizes is None:
        return num_blocks, llama_config(options.shape, options.blocks, options.length, _VOCABULARY)
    if options.device == "cuda":
        raise InputError(
            f"--device cuda: {options.shape} is counted alone; use cpu, or the shape of a Llama"
        )
    return num_blocks, mixture_config(sizes, options.blocks, options.length, _VOCABULARY)


def whole_model_seconds(num_blocks: int, block_s: float, files_s: float) -> float:
    """Of all blocks, each beside the files of its neighbours, and the files of one more."""
    return num_blocks * max(block_s, files_s) + files_s


def _typical(
    config: PretrainedConfig, options: Namespace, rates: Rates, gpus: int
) -> tuple[dict[str, Any], dict[str, Spent], Spent]:
    """What is counted on the first of so many GPUs; the phases of a block, and a whole one."""
    memory = memory_of(config, options, find_card(options.card, "--card"), gpus)
    found = count(config, options, rates, memory, gpus)
    typical = measured_model.typical_blocks(options.blocks)
    spent = [sum(phases.values(), Spent()) for phases in found["phases"][typical]]
    block = sum(found["blocks"][typical], Spent())
    phases = mean_phases(found["phases"][typical])
    rest = block - sum(spent, Spent())
    return found, phases | {"elsewhere": rest / len(spent)}, block / len(spent)


def memory_of(config: PretrainedConfig, options: Namespace, card: Card, gpus: int = 1) -> Memory:
    """What the stage would do on empty cards: states on them, and what fits beside them is held.

    Raises:
        InputError: the hidden states alone have no room there.
    """
    num_models = 2 if get_method(options.method).needs_teacher else 1
    num_rows = -(-options.samples // gpus)
    states = 2.0 * num_models * num_rows * options.length * config.hidden_size
    sizes = Sizes(states, 0.0, ROOM_ON_GPU * card.memory_bytes, math.inf, is_one_memory=False)
    if sizes.place != "device":
        raise InputError(
            f"--samples {options.samples}: hidden states of {states / 1e9:.0f} GB have no room on "
            f"one {card.name}; give fewer rows"
        )
    return Memory(options.batch_size, spare_bytes=sizes.spare("device"))


def count(
    config: PretrainedConfig, options: Namespace, rates: Rates, memory: Memory, gpus: int = 1
) -> dict[str, Any]:
    """Prune the blocks on the stand-in, or on the first of several.

    Returns:
        "phases": for each block, phase -> what it took; "blocks": what each took in all; "kernels":
        name -> launches of all blocks.
    """
    method, order = get_method(options.method), options.order
    model = empty_model(config)
    with stand_in_gpu(rates) as gpu:
        without_data(model)
        rows = random_rows(options.samples, options.length, _VOCABULARY, options.seed)
        marks = [gpu.now()]
        gpu.kernels.clear()
        clock: Any = gpu.now
        comm = Comm.single() if gpus == 1 else StandInComm(0, gpus, gpu=gpu)
        result = prune_model(
            model, rows, method, Pattern.parse("2:4"), PruneParams(), comm=comm,
            memory=memory, clock=clock,
            layers=LayerChoice(order=None if order == "auto" else order),
            on_block=lambda done, total: marks.append(gpu.now()),
        )  # fmt: skip
    phases = [
        phase_seconds(layer for layer in result.layers if layer.block == index)
        for index in range(options.blocks)
    ]
    blocks = [after - before for before, after in itertools.pairwise(marks)]
    return {"phases": phases, "blocks": blocks, "kernels": dict(gpu.kernels)}


def _phase_table(
    phases: dict[str, Spent], block: Spent, measured: dict[str, Any] | None, typical: slice
) -> Table:
    rows = []
    seconds = {} if measured is None else mean_phases(measured["block_phases_s"][typical])
    ordered = sorted(phases.items(), key=lambda one: one[1].get("s", 0.0), reverse=True)
    for name, spent in [*ordered, ("all", block)]:
        products = spent.get("operations:half", 0.0) + spent.get("operations:attention", 0.0)
        kinds = ("float32", "factor", "sweep")
        singles = sum(spent.get(f"operations:{kind}", 0.0) for kind in kinds)
        beside = seconds.get(name) if name != "all" else sum(seconds.values())
        rows.append(
            (
                name, f"{spent.get('s', 0.0):.3f} s", f"{beside:.3f} s" if beside else "",
                spent.bound, f"{products / 1e12:.1f}",
                f"{singles / 1e12:.2f}",
                f"{spent.get('bytes', 0.0) / 1e9:.1f}", f"{spent.get('launches', 0.0):.0f}",
                f"{spent.get('waits', 0.0):.0f}",
            )
        )  # fmt: skip
    head = ("phase of a block", "counted", "measured", "bound by", "16-bit TFLOP", "fp32 TFLOP",
            "GB", "launches", "waits")  # fmt: skip
    return Table(head, rows)


def _kernel_table(kernels: dict[str, tuple[int, float]], num_blocks: int) -> Table:
    most = sorted(kernels.items(), key=lambda one: -one[1][1])[:12]
    rows = [
        (name, f"{seconds / num_blocks:.3f} s", f"{times / num_blocks:.0f}")
        for name, (times, seconds) in most
    ]
    return Table(("operation or kernel", "s of a block", "launches of a block"), rows)
