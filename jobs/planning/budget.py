"""Which model is cheapest over its life: a dense one trained for it, or one made sparse."""

from __future__ import annotations

from functools import partial
from typing import Any

from conf.schema import PlanJobConfig
from jobs.planning.layouts import Machine, machine_of, training_of
from jobs.planning.models import shape_of
from sparsify.costs.deploy import deployed_sizes, kv_cache_bytes
from sparsify.costs.scaling import LAWS, cheapest_small_model
from sparsify.costs.seconds import Rates, step_seconds, total
from sparsify.costs.shapes import ModelShape
from sparsify.errors import InputError

_LARGEST = 4.0  # times the model, of the dense ones that are looked at

_TRAINING_SHARE = 0.45  # of a card's peak in a plain training: docs/plan.md


def make_budget(config: PlanJobConfig) -> dict[str, Any]:
    """GPU-hours of training and of serving for every way to the same loss.

    The larger model is there already: what its own training cost is not counted, what it was worth
    is (`plan.trained_tokens`). The dense small one is trained from nothing to the loss that the
    recovered one has, which both scaling laws bracket.

    Raises:
        InputError: no GPU is named, or no dense model reaches the loss.
    """
    settings = config.plan
    machine = machine_of(config.of_stage("distill"), settings.memory_share)
    shape, note = shape_of(config.model.path)
    if machine.card is None:
        raise InputError("cluster.card: budget counts GPU-hours; name the GPU, such as h100")
    rates, peak = machine.rates(2), machine.card.flops["bf16"]

    def training(operations: float) -> float:
        return operations / (_TRAINING_SHARE * peak) / 3600

    def serving(size: float, bytes_per_weight: float, speedup: float = 1.0) -> float:
        share = size / shape.num_parameters
        second = _token_seconds(config, shape, share, bytes_per_weight, speedup, rates)
        return settings.served_tokens * second / 3600

    recovery = _recovery_hours(config, machine, shape)
    sizes = {(d.format, d.is_packed): d.weight_bytes for d in deployed_sizes(shape)}
    count = shape.num_parameters
    ways = []
    for label, key, hours, gap, speedup in (
        ("as it is, bf16", ("bf16", False), 0.0, 0.0, 1.0),
        ("as it is, int4", ("int4", False), 0.0, 0.0, 1.0),
        ("pruned and recovered, bf16", ("bf16", True), recovery, settings.loss_gap,
         settings.sparse_speedup),
        ("pruned, recovered and int4", ("int4", True), recovery, settings.loss_gap,
         settings.sparse_speedup),
    ):  # fmt: skip
        # Without an engine for it, 2:4 is served with its zeros in place.
        stored = key if speedup > 1 else (key[0], False)
        hours_served = serving(count, sizes[stored] / count, speedup)
        ways.append({"label": label, "training_hours": hours, "serving_hours": hours_served,
                     "gap": gap, "total_hours": hours + hours_served})  # fmt: skip
    small = []
    for law in LAWS:
        loss = law.loss(count, settings.trained_tokens) + settings.loss_gap
        for label, width in (("bf16", 2.0), ("int4", sizes["int4", False] / count)):
            served = partial(serving, bytes_per_weight=width)
            found = cheapest_small_model(law, loss, _LARGEST * count, training, served)
            small.append({
                "label": f"dense, {label}, {law.name}", "law": law.name,
                "parameters": found.num_parameters, "tokens": found.num_tokens, "loss": loss,
                "training_hours": found.training, "serving_hours": found.serving,
                "total_hours": found.total,
            })  # fmt: skip
    return {
        "model": config.model.path, "note": note, "parameters": count,
        "served_tokens": settings.served_tokens, "trained_tokens": settings.trained_tokens,
        "loss_gap": settings.loss_gap, "machine": machine.name, "ways": ways, "small": small,
        "price": settings.price, "sparse_speedup": settings.sparse_speedup,
    }  # fmt: skip


def _recovery_hours(config: PlanJobConfig, machine: Machine, shape: ModelShape) -> float:
    setup = training_of(config, machine)
    seconds = total(step_seconds(shape, shape, setup, machine.rates(setup.element_bytes)))
    steps = config.distill.num_tokens / (config.distill.batch_size * config.data.sequence_length)
    return steps * seconds * machine.num_workers / 3600


def _token_seconds(
    config: PlanJobConfig, shape: ModelShape, share: float, bytes_per_weight: float,
    speedup: float, rates: Rates,
) -> float:  # fmt: skip
    """GPU-seconds of one token served, by the roofline: weights are read once for all requests.

    Keys and values shrink with the model, whose width and depth do.
    """
    settings = config.plan
    count = share * shape.num_parameters
    keys = kv_cache_bytes(shape, settings.context_tokens) * share
    read = (count * bytes_per_weight / settings.batch_size + keys) / rates.bandwidth
    computed = 2 * count / rates.products / speedup
    return max(read, computed)
