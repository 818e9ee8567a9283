"""A run that cannot fit is refused before it starts, with the options that would make it fit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from conf.schema import Config
from jobs.planning.choices import Recovery
from jobs.planning.layouts import Machine, machine_of, methods_of, pruning_of, training_of
from jobs.planning.models import shape_of
from sparsify.costs.memory import MemoryUse, pruning_memory
from sparsify.costs.shapes import ModelShape
from sparsify.errors import InputError

_SHARE = 0.95  # of a card's memory: what is left is the allocator's


def check_recovery(config: Config, dense: Path, has_teacher: bool = True) -> None:
    """Require that a recovery fits the cluster's card; nobody looks where it names none.

    Raises:
        InputError: it does not; says what is missing, and the overrides that make it fit.
    """
    shape = _countable("distill", config, dense)
    if shape is None:
        return
    machine = machine_of(config, _SHARE)
    setup = training_of(config, machine)
    if shape.untraced is not None:
        _say("distill", f"{shape.name}: cannot be followed without weights ({shape.untraced})")
        return
    recovery = Recovery(
        shape, shape if has_teacher and not config.distill.teacher_cache else None, setup, machine,
        machine.rates(setup.element_bytes),
    )  # fmt: skip
    asked = recovery.choice()
    if recovery.fits(asked):
        return
    found = recovery.cheapest()
    way_out = "no ZeRO stage, recomputing or offloading makes it fit; use more or larger GPUs"
    if found is not None:
        way_out = f"use {' '.join(found.overrides())} ({_gigabytes(found.memory.total)} GB)"
    raise InputError(f"distill: {_too_much(asked.memory, machine)}; {way_out}")


def check_pruning(config: Config, dense: Path) -> None:
    """Require that a pruning fits the cluster's card; nobody looks where it names none.

    Hidden states wait in host memory or on the disk where a card has no room for them, so they do
    not count unless they were asked for there.

    Raises:
        InputError: it does not; says what is missing, and the overrides that make it fit.
    """
    shape = _countable("prune", config, dense)
    if shape is None:
        return
    machine = machine_of(config, _SHARE)
    for method in methods_of(config):
        memory = _pruning(config, machine, shape, method)
        if memory.total <= machine.memory_bytes:
            continue
        words, smaller = _smaller(config, machine, shape, method)
        way_out = f"use {' '.join(words)} ({_gigabytes(smaller)} GB)" if words else (
            "its Hessians alone do not fit: use larger GPUs, or another prune.method"
        )  # fmt: skip
        raise InputError(f"prune: method {method}: {_too_much(memory, machine)}; {way_out}")


def _countable(stage: str, config: Config, dense: Path) -> ModelShape | None:
    """The sizes of the model; None where nobody looks, or, which is said, they cannot be known."""
    if config.cluster.card is None:
        return None
    try:
        return shape_of(str(dense))[0]
    except InputError as error:
        _say(stage, str(error))
        return None


def _say(stage: str, why: str) -> None:
    print(f"warning: {stage}: nobody looks whether it fits the cards: {why}", file=sys.stderr)


def _pruning(config: Config, machine: Machine, shape: ModelShape, method: str) -> MemoryUse:
    setup = pruning_of(config, machine, method, shape)
    if config.prune.activations == "auto":
        setup = replace(setup, on_device=False)
    return pruning_memory(shape, setup)


def _smaller(
    config: Config, machine: Machine, shape: ModelShape, method: str
) -> tuple[list[str], float]:
    """Overrides that make a pruning fit, and what it then takes; none if nothing does."""
    setup = pruning_of(config, machine, method, shape)
    words = [] if config.prune.activations in ("auto", "disk") else ["prune.activations=host"]
    setup = replace(setup, on_device=False)
    rows = setup.batch_size
    while rows >= 1:
        smaller = replace(setup, batch_size=rows)
        total = pruning_memory(shape, smaller).total
        if total <= machine.memory_bytes:
            more = [f"prune.batch_size={rows}"] if rows < setup.batch_size else []
            return [*words, *more], total
        rows //= 2
    return [], 0.0


def _too_much(memory: MemoryUse, machine: Machine) -> str:
    largest = sorted(memory.parts.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in largest)
    return (
        f"needs {_gigabytes(memory.total)} GB on every GPU ({parts}), and {machine.name} has "
        f"{_gigabytes(machine.memory_bytes)} to give"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"
