"""The teacher of a recovery: loaded, rotated into the student's basis, placed on the workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from cluster.runtime.worker import WorkerContext
from conf.options.distill import DistillConfig
from jobs.training.student import flops_of, open_blocks, prove
from sparsify.costs.flops import ModelFlops
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.evaluation.divergence import forward_kl
from sparsify.models.blocks import Blocks
from sparsify.models.float8 import to_float8_
from sparsify.models.lm_head import LanguageHead
from sparsify.models.structure import base_of
from sparsify.models.training import compile_layers
from sparsify.rotation.basis import Rotation, fold_rotation

_PROBE_TOKENS = 256


@dataclass
class TeacherModel:
    """The frozen dense model of a recovery, on its workers."""

    model: Any
    head: LanguageHead
    flops: ModelFlops | None
    """None where they cannot be counted"""
    float8_kl: float | None = None
    """KL divergence per token from the teacher as it was to the one in 8 bits; None without them"""


def load_teacher(
    path: Path, settings: DistillConfig, rotation: Path | None, context: WorkerContext,
    probe: TokenRows, isolate: bool,
) -> TeacherModel:  # fmt: skip
    """The frozen teacher in evaluation mode, where and in the type that it is to have.

    A teacher that is split over workers is read block by block, unless a rotation has to be folded
    into it first: that is done to the whole model.

    Args:
        path: model folder.
        settings: `teacher_dtype` (null: that of the arithmetic of training), `teacher_placement`.
        rotation: file of the rotation that the student was pruned with.
        context: this worker.
        probe: rows on which a change to 8 bits is measured; the first few tokens are enough.
        isolate: whether documents of a row are kept apart; proved of the model.

    Raises:
        InputError: the workers of the nodes are not equally many; or the model is not what a
            recovery can learn from.
    """
    dtype = settings.teacher_dtype or ("bfloat16" if settings.precision == "bf16" else "float32")
    held = "bfloat16" if dtype == "float8" else dtype
    is_split = settings.teacher_placement != "replicated" and context.world_size > 1
    why = f"distill.teacher_placement={settings.teacher_placement}"
    source = open_blocks(path, held, context, is_split and rotation is None, why)
    if rotation is not None:
        fold_rotation(source.model, Rotation.load(rotation))
    return make_teacher(source, settings, context, probe, isolate)


def make_teacher(
    source: Blocks, settings: DistillConfig, context: WorkerContext, probe: TokenRows, isolate: bool
) -> TeacherModel:
    """`load_teacher` of blocks."""
    teacher: Any = source.model
    flops = flops_of(teacher, context)
    teacher.requires_grad_(False).eval()
    is_split = settings.teacher_placement != "replicated" and context.world_size > 1
    mesh = _mesh(settings.teacher_placement, context) if is_split else None
    found = None
    for index in range(len(source.blocks)):
        block = source.open(index)
        found = found or prove(source, settings, isolate, context)
        if mesh is not None:
            fully_shard(block, mesh=mesh)  # gathered when they are used
    assert found is not None, "a list of blocks is never empty"
    if mesh is not None:
        _shard_rest(teacher, source, mesh)
    kl = None
    if settings.teacher_dtype == "float8":
        row = TokenRows(probe.ids_NT[:1, :_PROBE_TOKENS], probe.positions_NT[:1, :_PROBE_TOKENS])
        before = probe_logits(teacher, row.to(context.device))
        to_float8_(teacher)
        kl = float(forward_kl(probe_logits(teacher, row.to(context.device)), before))
    if settings.compile:
        compile_layers(teacher)
    return TeacherModel(teacher, found, flops, kl)


@torch.no_grad()
def probe_logits(model: nn.Module, row: TokenRows) -> torch.Tensor:
    """Logits (1, T, V) of one row."""
    return model(input_ids=row.ids_NT, position_ids=row.positions_NT, use_cache=False).logits


def _mesh(placement: str, context: WorkerContext) -> DeviceMesh:
    """The workers among which a teacher is split: a node's, or all.

    Raises:
        InputError: the workers of the nodes are not equally many.
    """
    world_size = dist.get_world_size()
    size = context.local_world_size if placement == "node" else world_size
    if world_size % size:
        raise InputError(
            f"distill.teacher_placement=node: {world_size} workers do not make whole nodes of "
            f"{size}; use distill.teacher_placement=sharded"
        )
    shape, names = (world_size // size, size), ("node", "local")
    return init_device_mesh(context.device, shape, mesh_dim_names=names)["local"]


def _shard_rest(teacher: Any, source: Blocks, mesh: DeviceMesh) -> None:
    """Have the next block's weights read while one computes, after blocks that are split.

    Embedding, last norm and head stay whole on every worker: the loss multiplies with the head
    itself.
    """
    base = base_of(teacher)
    inside = {id(p) for block in source.blocks for p in block.parameters()}
    whole = {p for p in base.parameters() if id(p) not in inside}
    fully_shard(base, mesh=mesh, ignored_params=whole)
