"""The teacher of a recovery: loaded, rotated into the student's basis, placed on the workers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from sparsify.distill import forward_kl
from sparsify.errors import InputError
from sparsify.models.float8 import to_float8_
from sparsify.models.load import load_model
from sparsify.models.structure import find_blocks
from sparsify.rotation import Rotation, fold_rotation
from sparsify.text import TokenRows

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from conf.stages import DistillConfig

_PROBE_TOKENS = 256


def load_teacher(
    path: Path, settings: DistillConfig, rotation: Path | None, context: WorkerContext
) -> nn.Module:
    """The frozen teacher in evaluation mode, whole on this worker's device.

    Args:
        path: model folder.
        settings: its dtype, or that of the arithmetic of training.
        rotation: file of the rotation that the student was pruned with.
        context: this worker.
    """
    dtype = settings.teacher_dtype or ("bfloat16" if settings.precision == "bf16" else "float32")
    held = "bfloat16" if dtype == "float8" else dtype
    teacher = load_model(path, held, context.device).requires_grad_(False).eval()
    if rotation is not None:
        fold_rotation(teacher, Rotation.load(rotation))
    return teacher


def place_teacher(
    teacher: nn.Module, settings: DistillConfig, context: WorkerContext, probe: TokenRows
) -> float | None:
    """Turn the teacher into 8-bit floats, or split its blocks over workers, as configured.

    Args:
        teacher: from `load_teacher`; changed in place.
        settings: `teacher_dtype` and `teacher_placement`.
        context: this worker.
        probe: rows on which the change to 8 bits is measured; the first few tokens are enough.

    Returns:
        KL divergence per token from the teacher as it was to the one in 8 bits; None without them.

    Raises:
        InputError: the workers of the nodes are not equally many.
    """
    if settings.teacher_dtype == "float8":
        row = TokenRows(probe.ids_NT[:1, :_PROBE_TOKENS], probe.positions_NT[:1, :_PROBE_TOKENS])
        before = _logits(teacher, row.to(context.device))
        to_float8_(teacher)
        return float(forward_kl(_logits(teacher, row.to(context.device)), before))
    if settings.teacher_placement != "replicated" and context.world_size > 1:
        _shard_blocks(teacher, settings.teacher_placement, context)
    return None


@torch.no_grad()
def _logits(model: nn.Module, row: TokenRows) -> torch.Tensor:
    return model(input_ids=row.ids_NT, position_ids=row.positions_NT, use_cache=False).logits


def _shard_blocks(teacher: nn.Module, placement: str, context: WorkerContext) -> None:
    """Split every block's weights over a node's workers or over all, gathered when they are used.

    FSDP2 reads the next block's weights while one computes. Embedding, last norm and head stay
    whole on every worker: the loss multiplies with the head itself.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world_size = dist.get_world_size()
    size = context.local_world_size if placement == "node" else world_size
    if world_size % size:
        raise InputError(
            f"distill.teacher_placement=node: {world_size} workers do not make whole nodes of "
            f"{size}; use distill.teacher_placement=sharded"
        )
    shape, names = (world_size // size, size), ("node", "local")
    mesh = init_device_mesh(context.device, shape, mesh_dim_names=names)["local"]
    _, blocks = find_blocks(teacher)
    base: nn.Module = teacher.base_model  # type: ignore[assignment]
    inside = {id(p) for block in blocks for p in block.parameters()}
    whole = {p for p in base.parameters() if id(p) not in inside}
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(base, mesh=mesh, ignored_params=whole)
