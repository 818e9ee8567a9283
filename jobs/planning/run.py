"""The plan of a run: memory, choices, time, money, disk, network and what is served at the end."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from conf.options.prune import PruneConfig
from conf.options.quantize import QuantizeConfig
from conf.schema import PlanJobConfig
from jobs.planning.calibration import Calibration, Load, read_calibration
from jobs.planning.choices import PLACEMENTS, Recovery
from jobs.planning.layouts import (
    Machine,
    machine_of,
    methods_of,
    pruning_of,
    training_of,
    with_options,
)
from jobs.planning.models import shape_of
from sparsify.costs.cards import cards
from sparsify.costs.deploy import (
    AdapterTraining,
    adapter_memory,
    deployed_sizes,
    kv_cache_bytes,
    serving_bytes,
)
from sparsify.costs.layout import Pruning
from sparsify.costs.memory import MemoryUse, pruning_memory, whole_memory
from sparsify.costs.seconds import (
    forward_seconds,
    pruning_seconds,
    quantizing_seconds,
    step_seconds,
    total,
    traffic,
)
from sparsify.costs.shapes import ModelShape
from sparsify.costs.young import checkpoint_interval_steps

_START_S = 90.0  # of a stage: workers, imports, models read; measured 40 s on a CPU, guessed else

STATE_BYTES = 12  # of a weight in a checkpoint: float32 weight and two moments

HOST_RATE = 20e9  # bytes/s from a GPU to pinned host memory

_QLORA_CARDS = ("a100-40", "l40s", "a100-80")


def make_plan(config: PlanJobConfig, load: Load) -> dict[str, Any]:
    """What a run takes, as plain values; starts nothing and reads config.json alone.

    Args:
        config: of the run.
        load: see `calibration.read_calibration`.

    Raises:
        InputError: a model or card that is not known, or records that are none.
    """
    settings = config.plan
    machine = machine_of(config, settings.memory_share)
    machines = {
        stage: machine_of(config.of_stage(stage), settings.memory_share) for stage in config.stages
    }
    shape, note = shape_of(config.model.path)
    calibration = read_calibration(settings.records, machine, load)
    plan: dict[str, Any] = {
        "model": _model(config.model.path, shape, note),
        "machine": {
            "name": machine.name, "workers": machine.num_workers,
            "workers_per_node": machine.workers_per_node, "memory_bytes": machine.memory_bytes,
            "is_gpu": machine.card is not None, "products": machine.rates(4).products,
        },
        "calibration": asdict(calibration),
        "stages": list(config.stages),
    }  # fmt: skip
    if "prune" in config.stages:
        plan["pruning"] = _pruning(config, machines["prune"], shape)
    if "distill" in config.stages:
        plan["recovery"] = _recovery(config, machines["distill"], shape, calibration)
    plan["whole"] = _whole(config, machines, shape)
    plan["time"] = _time(config, machines, shape, calibration, plan)
    plan["disk"] = _disk(config, shape)
    plan["serving"] = _serving(config, shape)
    return plan


def _model(path: str, shape: ModelShape, note: str | None) -> dict[str, Any]:
    return {
        "path": path, "note": note, "class": shape.name, "parameters": shape.num_parameters,
        "prunable": shape.linear_parameters, "blocks": shape.num_blocks,
    }  # fmt: skip


def _use(memory: MemoryUse, machine: Machine) -> dict[str, Any]:
    return {
        "parts": memory.parts, "bytes": memory.total, "moment": memory.moment,
        "host_bytes": memory.host, "fits": memory.total <= machine.memory_bytes,
    }  # fmt: skip


def _pruning(config: PlanJobConfig, machine: Machine, shape: ModelShape) -> dict[str, Any]:
    return {
        method: _walk(pruning_of(config, machine, method, shape), machine, shape, config.prune)
        for method in methods_of(config)
    }


def _walk(
    setup: Pruning, machine: Machine, shape: ModelShape, options: PruneConfig | QuantizeConfig
) -> dict[str, Any]:
    """Memory of a walk block by block; on the host wait the states that the device cannot hold."""
    memory, place = (
        pruning_memory(shape, setup),
        "device" if setup.on_device else options.activations,
    )
    if memory.total > machine.memory_bytes and options.activations == "auto":
        place, memory = "host", pruning_memory(shape, replace(setup, on_device=False))
    return {**_use(memory, machine), "activations": place}


def _quantizing_of(config: PlanJobConfig, machine: Machine, shape: ModelShape) -> Pruning:
    """How the walk of the stage quantize is laid out: SparseGPT's, with options of its own."""
    options = config.quantize
    return replace(
        pruning_of(config, machine, "sparsegpt", shape), method=options.method, order="layer",
        rotation_steps=0,
        num_samples=options.num_samples, batch_size=options.batch_size,
        needs_teacher=options.has_teacher, on_device=options.activations in ("auto", "device"),
    )  # fmt: skip


def _whole(
    config: PlanJobConfig, machines: dict[str, Machine], shape: ModelShape
) -> dict[str, Any]:
    """Memory of scoring, which loads whole models in every worker, and of quantising."""
    width, length = 4 if config.model.dtype == "float32" else 2, config.data.sequence_length
    found = {}
    if "evaluate" in config.stages:
        memory = whole_memory(shape, 2, width, config.evaluate.batch_size * length)
        found["evaluate"] = _use(memory, machines["evaluate"])
    if "quantize" in config.stages:
        machine = machines["quantize"]
        setup = _quantizing_of(config, machine, shape)
        found["quantize"] = _walk(setup, machine, shape, config.quantize)
    return found


def recovery_of(config: PlanJobConfig, machine: Machine, shape: ModelShape) -> Recovery:
    """The recovery of a run, whose student and teacher have one shape."""
    setup = training_of(config, machine)
    teacher = None if config.distill.teacher_cache else shape
    return Recovery(shape, teacher, setup, machine, machine.rates(setup.element_bytes))


_RECOMPUTED = (
    ("whole", 0.0), ("whole", 0.25), ("whole", 0.5), ("whole", 1.0), ("elementwise", 1.0),
)  # fmt: skip
"""what the plan's table has: `distill.recompute` and the share of the blocks"""


def _recovery(
    config: PlanJobConfig, machine: Machine, shape: ModelShape, calibration: Calibration
) -> dict[str, Any]:
    recovery = recovery_of(config, machine, shape)
    asked, best = recovery.choice(), recovery.cheapest()
    stages = [0, 1, 2, 3] if recovery.setup.element_bytes == 4 else [1, 2, 3]
    by_stage = {stage: _use(recovery.choice(zero_stage=stage).memory, machine) for stage in stages}
    grid = []
    for stage in stages:
        for place in PLACEMENTS if machine.num_workers > 1 else PLACEMENTS[:1]:
            for kind, share in _RECOMPUTED:
                options = {
                    "zero_stage": stage, "teacher_placement": place, "recompute_share": share,
                    "recompute": kind,
                }  # fmt: skip
                choice = recovery.choice(**options)
                grid.append({
                    **options, "bytes": choice.memory.total, "fits": recovery.fits(choice),
                    "step_s": calibration.factor("distill") * choice.step_s,
                })  # fmt: skip
    chosen = asked if recovery.fits(asked) or best is None else best
    return {
        "asked": _use(asked.memory, machine),
        "by_stage": by_stage,
        "grid": grid,
        "best": None if best is None else {
            **_use(best.memory, machine), "overrides": best.overrides(),
            "step_s": calibration.factor("distill") * best.step_s,
        },
        "planned": chosen.overrides(),
        "step": _step(config, recovery, chosen.options, calibration),
    }  # fmt: skip


def _step(
    config: PlanJobConfig, recovery: Recovery, options: dict[str, Any], calibration: Calibration
) -> dict[str, Any]:
    """Time of a step of the layout that is planned, what it sends, and how often to save."""
    setup = with_options(recovery.setup, options)
    factor = calibration.factor("distill")
    parts = step_seconds(recovery.student, recovery.teacher, setup, recovery.rates)
    parts = {name: factor * seconds for name, seconds in parts.items()}
    step_s = total(parts)
    tokens = config.distill.batch_size * config.data.sequence_length
    sent = traffic(recovery.student, recovery.teacher, setup)
    state = STATE_BYTES * recovery.student.num_parameters
    stall_s = state / setup.world_size / HOST_RATE
    mtbf_s = config.distill.mtbf_hours * 3600
    every = checkpoint_interval_steps(max(stall_s, 0.01), step_s, mtbf_s)
    return {
        "parts_s": parts, "step_s": step_s, "tokens": tokens,
        "num_steps": max(1, config.distill.num_tokens // tokens),
        "tokens_per_s_per_gpu": tokens / step_s / setup.world_size,
        "sent_bytes": sent, "sent_rate": sent / step_s,
        "network_rate": sent / step_s / setup.gpus_per_node
        if setup.world_size > setup.gpus_per_node else 0.0,
        "checkpoint_bytes": state, "stall_s": stall_s, "mtbf_hours": config.distill.mtbf_hours,
        "checkpoint_every_steps": every, "checkpoint_every_s": every * step_s,
    }  # fmt: skip


def _time(
    config: PlanJobConfig, machines: dict[str, Machine], shape: ModelShape,
    calibration: Calibration, plan: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Seconds of every stage, GPU-hours and money."""
    width, length = 2 if config.model.dtype != "float32" else 4, config.data.sequence_length
    rates = {stage: machine.rates(width) for stage, machine in machines.items()}
    seconds: dict[str, float] = {}
    if "prune" in config.stages:
        seconds["prune"] = calibration.factor("prune") * sum(
            total(pruning_seconds(
                shape,
                replace(pruning_of(config, machines["prune"], method, shape),
                        on_device=plan["pruning"][method]["activations"] == "device"),
                rates["prune"], config.prune,
            ))
            for method in methods_of(config)
        )  # fmt: skip
    if "distill" in config.stages:
        step = plan["recovery"]["step"]
        every = config.distill.checkpoint_every_steps or step["checkpoint_every_steps"]
        saves = step["num_steps"] // every
        seconds["distill"] = step["num_steps"] * step["step_s"] + saves * step["stall_s"]
    if "evaluate" in config.stages:
        models = len(methods_of(config)) + 2 if "prune" in config.stages else 2
        forwards = 2 * models  # each beside the dense model
        tokens = config.evaluate.num_tokens / machines["evaluate"].num_workers
        one_s = forward_seconds(shape, tokens, length, rates["evaluate"])
        seconds["evaluate"] = forwards * one_s
    if "quantize" in config.stages:
        setup = _quantizing_of(config, machines["quantize"], shape)
        seconds["quantize"] = total(
            quantizing_seconds(shape, setup, rates["quantize"], config.quantize)
        )
    if "export" in config.stages:
        seconds["export"] = 3 * 2.0 * shape.num_parameters / rates["export"].disk
    seconds = {name: value + _START_S for name, value in seconds.items()}
    hours = sum(value / 3600 * machines[name].num_workers for name, value in seconds.items())
    price = config.plan.price
    return {
        "stages_s": seconds, "all_s": sum(seconds.values()), "gpu_hours": hours,
        "money": None if price is None else price * hours,
    }  # fmt: skip


def _disk(config: PlanJobConfig, shape: ModelShape) -> dict[str, float]:
    """Bytes that a run's folder needs, by what they are."""
    width = 4 if config.model.dtype == "float32" else 2
    model = float(width * shape.num_parameters)
    masks = shape.linear_parameters / 8
    found: dict[str, float] = {}
    if "prune" in config.stages:
        methods = methods_of(config)
        found["pruned models"] = len(methods) * (model + masks)
        states = config.prune.num_samples * config.data.sequence_length * shape.hidden_size
        found["hidden states, while pruning"] = 2.0 * width * states * 2
        found["rotated model, while pruning"] = model * (config.prune.rotation_steps != 0)
    if "distill" in config.stages:
        settings = config.distill
        kept = settings.keep_checkpoints + 1
        if settings.milestone_every_steps:
            tokens = settings.batch_size * config.data.sequence_length
            kept += settings.num_tokens // tokens // settings.milestone_every_steps
        found["checkpoints, while training"] = kept * float(STATE_BYTES) * shape.num_parameters
        found["recovered model"] = model + masks
        found["training rows"] = settings.num_tokens * (4 + 1 / 8)
    sizes = {(d.format, d.is_packed): d.weight_bytes for d in deployed_sizes(shape, width)}
    if "quantize" in config.stages:
        found["quantised model"] = model + masks
    if "export" in config.stages:
        found["exported folders"] = model + sizes["bf16", True] + sizes["int4", True]
    return found


def _serving(config: PlanJobConfig, shape: ModelShape) -> dict[str, Any]:
    """Bytes in every format, and how many of each card hold it with the requests' keys."""
    tokens = config.plan.context_tokens * config.plan.batch_size
    share = config.plan.memory_share
    rows = []
    for found in deployed_sizes(shape):
        need = serving_bytes(shape, found.weight_bytes, tokens)
        alone = serving_bytes(shape, found.weight_bytes, config.plan.context_tokens)
        rows.append({
            "format": found.format, "is_packed": found.is_packed, "bytes": found.weight_bytes,
            "cards": {
                key: [math.ceil(size / (share * card.memory_bytes)) for size in (alone, need)]
                for key, card in cards().items()
                if found.format != "fp8" or "fp8" in card.flops
            },
        })  # fmt: skip
    large, _ = shape_of("llama-2-70b")
    sizes = {(d.format, d.is_packed): d.weight_bytes for d in deployed_sizes(large)}
    tuning = adapter_memory(large, AdapterTraining(rank=4, tokens=1024))
    return {
        "kv_bytes_per_1k": kv_cache_bytes(shape, 1000),
        "rows": rows,
        "llama-2-70b": {
            "int8": sizes["int8", False], "int4": sizes["int4", False],
            "qlora": sum(tuning.values()), "qlora_parts": tuning,
            "kv_bytes": kv_cache_bytes(large, config.plan.context_tokens),
            "cards": {key: cards()[key].memory_bytes for key in _QLORA_CARDS},
        },
    }  # fmt: skip
