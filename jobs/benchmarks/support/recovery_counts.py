"""A step of recovery on a GPU that is not there: the loop's own step, run and counted."""

from __future__ import annotations

import math
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig

from cluster.stages import StagedClusterSpec
from conf.options.data import DataConfig
from conf.options.distill import DistillConfig
from conf.schema import Config
from jobs.benchmarks.sides.step import Here
from jobs.benchmarks.support.stand_in_compile import counted_compile
from jobs.benchmarks.support.stand_in_gpu import (
    Spent,
    StandInGpu,
    empty_model,
    stand_in_gpu,
    without_data,
)
from jobs.benchmarks.support.stand_in_zero import SplitTeacher, StandInZero
from jobs.training.batches import Batch, Batches
from jobs.training.loop import Recovery, Setup
from jobs.training.mask_guard import MaskGuard
from sparsify.costs.cards import Card
from sparsify.costs.seconds import Rates
from sparsify.data.rows import TokenRows
from sparsify.distillation.student import DistillStudent
from sparsify.masks.storage import BitMasks
from sparsify.models import varlen
from sparsify.models.lm_head import find_head
from sparsify.models.structure import find_blocks, linears_of
from sparsify.models.training import compile_layers, prepare_student, recompute_layers

PHASES = (
    "teacher", "teacher gathered", "student forward", "head loss", "backward", "engine",
    "gradient masks", "optimizer", "guard", "rows and figures",
)  # fmt: skip
"""phases of a step, in the order in which they are shown"""


@dataclass(frozen=True)
class Counted:
    """What a step takes."""

    phases: dict[str, Spent]
    kernels: dict[str, tuple[float, float]]
    """name -> launches of a step, and seconds of the device"""

    @property
    def step(self) -> Spent:
        """All phases."""
        return sum(self.phases.values(), Spent())


def document_lengths(length: int, document: int) -> list[int]:
    """Tokens of the documents of a row: whole ones, and one that the row's end cuts."""
    whole, rest = divmod(length, document)
    return [document] * whole + ([rest] if rest else [])


def count_step(
    config: LlamaConfig, options: Namespace, card: Card, rates: Rates, num_parts: int
) -> Counted:
    """One optimizer step of `num_parts` micro-batches, on the middle one of `options.gpus`.

    Steps of one and of two micro-batches are run, and what the second adds is added again for each
    further one. A step before them makes what later ones find there.

    Raises:
        TwofourError: see `stand_in_gpu`.
    """
    one = _steady_step(config, options, card, rates, 1)
    if num_parts == 1:
        return one
    two, more = _steady_step(config, options, card, rates, 2), num_parts - 1
    phases = {name: spent + (two.phases[name] - spent) * more for name, spent in one.phases.items()}
    kernels = {}
    for name, (times, seconds) in two.kernels.items():
        first_times, first_s = one.kernels.get(name, (0.0, 0.0))
        kernels[name] = (
            first_times + (times - first_times) * more, first_s + (seconds - first_s) * more
        )  # fmt: skip
    return Counted(phases, kernels)


def _steady_step(
    config: LlamaConfig, options: Namespace, card: Card, rates: Rates, parts: int
) -> Counted:
    models = tuple(empty_model(config) for _ in range(2))
    with stand_in_gpu(rates) as gpu, tempfile.TemporaryDirectory() as folder:
        gpu.lengths = document_lengths(options.sequence_length, options.document_length)
        gpu.lengths = gpu.lengths * options.micro_batch_size
        compiled = counted_compile(gpu) if options.compile else nullcontext()
        with (
            compiled,
            _documents(gpu),
            _collectives(gpu, options.gpus, ring_rate(card, rates, options.gpus)),
        ):
            recovery = _recovery(models, options, card, rates, gpu, parts, Path(folder))
            _in_phases(gpu, recovery)
            with gpu.phase("rows and figures"):
                recovery._step(0)
                gpu.wait(is_asked=False)
                gpu.phases.clear()
                gpu.kernels.clear()
                recovery._step(1)
                gpu.wait(is_asked=False)
        return Counted({name: Spent(gpu.phases.get(name, {})) for name in PHASES}, {**gpu.kernels})


def ring_rate(card: Card, rates: Rates, gpus: int) -> float:
    """Bytes/s of a ring through all GPUs: it leaves a machine over all of its adapters."""
    local = card.gpus_per_node
    return rates.link if gpus <= local else min(rates.link, local * rates.network)


def _recovery(
    models: tuple[Any, ...], options: Namespace, card: Card, rates: Rates, gpu: StandInGpu,
    parts: int, folder: Path,
) -> Recovery:  # fmt: skip
    """As `jobs.training.build` puts it together, of models without data."""
    settings = DistillConfig(
        num_tokens=2 * parts * options.gpus * options.micro_batch_size * options.sequence_length,
        batch_size=parts * options.gpus * options.micro_batch_size,
        micro_batch_size=options.micro_batch_size, precision="bf16", zero_stage=2,
        compile=options.compile, recompute_share=options.recompute_share,
        recompute=options.recompute, learning_rate=1e-5,
    )  # fmt: skip
    run = Config(
        cluster=StagedClusterSpec(num_workers=options.gpus),
        data=DataConfig(sequence_length=options.sequence_length), distill=settings,
    )  # fmt: skip
    context: Any = Here("cuda", 1)
    context.world_size = options.gpus
    student, teacher = models
    for model in models:
        without_data(model)
    student.requires_grad_(True)
    prepare_student(student)
    recompute_layers(student, settings.recompute_share, settings.recompute)
    teacher.requires_grad_(False).eval()
    for model in (student, teacher):
        varlen.use_varlen(model)
        if settings.compile:
            compile_layers(model)
    if options.gpus > 1:
        SplitTeacher(find_blocks(teacher)[1], gpu, min(options.gpus, card.gpus_per_node))
    wrapped = DistillStudent(student, found=find_head(student))
    engine = StandInZero(wrapped, settings, gpu, options.gpus, ring_rate(card, rates, options.gpus))
    masks = _masks(student)
    pace: Any = SimpleNamespace(step_s=0.0, wants_checkpoint=lambda step: False)  # a clock
    return Recovery(
        Setup(
            context, run, engine, MaskGuard(engine, masks), find_head(teacher), None, masks,
            _Rows(settings, options), None, pace, folder, folder,
        )
    )  # fmt: skip


def _masks(model: Any) -> BitMasks:
    name, blocks = find_blocks(model)
    shapes = {
        f"{name}.{index}.{layer}": tuple(linear.weight.shape)
        for index, block in enumerate(blocks)
        for layer, linear in linears_of(block).items()
    }
    bits = {
        layer: torch.empty(math.ceil(math.prod(shape) / 8), dtype=torch.uint8)
        for layer, shape in shapes.items()
    }
    return BitMasks(bits, shapes)


class _Rows(Batches):
    """Rows of documents of one length, in place of a store's."""

    def __init__(self, settings: DistillConfig, options: Namespace) -> None:
        self._size, self._micro = settings.batch_size, settings.micro_batch_size
        self._world_size, self._cache = options.gpus, None
        shape = settings.batch_size // options.gpus, options.sequence_length
        self._rows = TokenRows(*(torch.zeros(shape, dtype=torch.int64) for _ in range(2)))

    def at(self, step: int) -> Batch:
        """This worker's part of a step."""
        return Batch(step, self._rows, 0, torch.ones(3, dtype=torch.float64), None)


@contextmanager
def _documents(gpu: StandInGpu) -> Iterator[None]:
    """Positions have no values here, from which documents would be found."""

    def find(positions_NT: Tensor) -> varlen.Documents:
        cu_seqlens_K = torch.empty(len(gpu.lengths) + 1, dtype=torch.int32)
        return varlen.Documents(cu_seqlens_K, max(gpu.lengths))

    with patch.object(varlen, "find_documents", find):
        yield


@contextmanager
def _collectives(gpu: StandInGpu, gpus: int, rate: float) -> Iterator[None]:
    def all_reduce(tensor: Tensor) -> None:
        gpu.exchange("all_reduce", 2.0 * tensor.numel() * tensor.element_size(), rate)()

    with (
        patch.object(dist, "all_reduce", all_reduce),
        patch.object(dist, "broadcast_object_list", lambda *_, **__: None),
        patch.object(dist, "get_rank", lambda: 0),
        patch.object(dist, "get_world_size", lambda: gpus),
    ):
        yield


def _in_phases(gpu: StandInGpu, recovery: Any) -> None:
    """Name the phases of a step, as `bench step` does."""
    engine, student = recovery.engine, recovery.engine.module
    for owner, method, phase in (
        (recovery, "_teacher", "teacher"), (student, "forward", "student forward"),
        (student.loss_head, "forward", "head loss"), (engine, "backward", "backward"),
        (engine, "step", "optimizer"), (recovery._guard, "check", "guard"),
        (recovery._guard, "mask_gradients", "gradient masks"),
    ):  # fmt: skip
        setattr(owner, method, _within(gpu, getattr(owner, method), phase))


def _within(gpu: StandInGpu, inner: Callable[..., Any], phase: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with gpu.phase(phase):
            return inner(*args, **kwargs)

    return call
