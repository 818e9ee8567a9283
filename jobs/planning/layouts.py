"""A run's options as the layouts that costs are counted for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from conf.schema import Config
from jobs.planning.processor import processor_rates
from sparsify.costs.cards import Card, find_card
from sparsify.costs.layout import Pruning, Training
from sparsify.costs.seconds import Rates, rates_of
from sparsify.costs.shapes import ModelShape
from sparsify.errors import InputError
from sparsify.kernels.sweep import KERNEL_GROUPS
from sparsify.methods import get_method
from sparsify.pattern import Pattern

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}

_CPU_MEMORY = 64e9

_LARGEST_ROTATED = (
    32e9  # bytes of a model that is rotated without being asked: prune.rotation_steps
)


@dataclass(frozen=True)
class Machine:
    """What a run has of its cluster."""

    name: str
    """of the card, or CPU"""
    card: Card | None
    """None for a CPU"""
    memory_bytes: float
    """of a worker, that may be taken"""
    num_workers: int
    workers_per_node: int

    def rates(self, element_bytes: int) -> Rates:
        """What a worker reaches; without a card, one thread of this machine's processor."""
        return rates_of(self.card, element_bytes) if self.card else processor_rates(element_bytes)


def machine_of(config: Config, memory_share: float) -> Machine:
    """The machine that a run is to use.

    Raises:
        InputError: a cluster of GPUs that does not say which.
    """
    spec = config.cluster
    per_node = max(1, spec.num_workers // spec.num_nodes)
    if spec.card is not None:
        card = find_card(spec.card, "cluster.card")
        memory = memory_share * card.memory_bytes
        return Machine(card.name, card, memory, spec.num_workers, per_node)
    if spec.uses_gpu:
        raise InputError(
            "cluster.card: is not known, and so neither memory nor speed; name the GPU, such as "
            "cluster.card=h100"
        )
    return Machine("CPU", None, _CPU_MEMORY, spec.num_workers, per_node)


def training_of(config: Config, machine: Machine) -> Training:
    """How the recovery is laid out."""
    settings, world = config.distill, machine.num_workers
    losses = settings.losses()
    teacher = settings.teacher_dtype
    return Training(
        world_size=world,
        gpus_per_node=machine.workers_per_node,
        zero_stage=settings.zero_stage,
        element_bytes=2 if settings.precision == "bf16" else 4,
        micro_batch_size=settings.micro_batch_size,
        sequence_length=config.data.sequence_length,
        num_micro_batches=max(1, settings.batch_size // (settings.micro_batch_size * world)),
        recompute_share=settings.recompute_share,
        recompute=settings.recompute,  # type: ignore[arg-type]
        compile=settings.compile,
        offload_optimizer=settings.offload_optimizer,
        hpz_size=settings.zero_hpz_size,
        teacher_placement=settings.teacher_placement,  # type: ignore[arg-type]
        teacher_bytes=None if teacher is None else _BYTES[teacher],
        square_head=losses.peak("square_head") > 0,
        uses_kl=losses.peak("kl") > 0 or losses.peak("reverse_kl") > 0,
        uses_gpu=machine.card is not None,
    )


def pruning_of(config: Config, machine: Machine, method: str, shape: ModelShape) -> Pruning:
    """How one method's walk is laid out; hidden states wait on the device where it is asked for."""
    settings, found = config.prune, get_method(method)
    width = _BYTES[config.model.dtype]
    rotates = method == settings.method == "twofour" and settings.existing == "ignore"
    rotates = rotates and width * shape.num_parameters <= _LARGEST_ROTATED
    steps = settings.rotation_steps if method == settings.method else 0
    return Pruning(
        method=method,
        order=found.order if settings.order == "auto" else settings.order,
        needs_hessian=found.needs_hessian,
        needs_factor=found.needs_factor,
        needs_teacher=found.needs_teacher,
        num_samples=settings.num_samples,
        sequence_length=config.data.sequence_length,
        batch_size=settings.batch_size,
        world_size=machine.num_workers,
        element_bytes=width,
        rotation_steps=(30 if rotates else 0) if steps is None else steps,
        on_device=settings.activations in ("auto", "device"),
        uses_gpu=machine.card is not None,
        has_search_kernels=Pattern.parse(settings.pattern).m in KERNEL_GROUPS,
    )


def methods_of(config: Config) -> list[str]:
    """The methods that a prune stage runs, in their order."""
    settings = config.prune
    return [name for name in settings.baselines if name != settings.method] + [settings.method]


def with_options(setup: Training, options: dict[str, Any]) -> Training:
    """A layout with some options of `distill` changed; the rows of a step stay."""
    rows = setup.micro_batch_size * setup.num_micro_batches
    changed = replace(setup, **options)
    return replace(changed, num_micro_batches=max(1, rows // changed.micro_batch_size))
