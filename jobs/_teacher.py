"""The teacher of a recovery: loaded, rotated into the student's basis, placed on the workers.

Or in its place a cache of its predictions (distill.teacher_cache), held against what the run asks.
"""

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
    from conf.schema import Config
    from conf.stages import DistillConfig
    from sparsify.sample_store import SampleCache

_PROBE_TOKENS = 256


def open_cache(config: Config) -> SampleCache | None:
    """The samples of the teacher that stand for it, None where the teacher itself is asked.

    Raises:
        InputError: the folder is not a whole cache.
    """
    from sparsify.sample_store import SampleCache

    folder = config.distill.teacher_cache
    return None if folder is None else SampleCache.open(Path(folder).absolute())


def check_cache(config: Config, teacher: Path) -> None:
    """Require that the cache, if there is one, was drawn from this teacher for these rows.

    Raises:
        InputError: not a cache, or one of another store, teacher, temperature or kind of rows.
    """
    from jobs._artifact import model_fingerprint
    from jobs.distill import given_store
    from sparsify.store import TokenStore

    cache = open_cache(config)
    if cache is None:
        return
    field, facts = f"distill.teacher_cache={config.distill.teacher_cache}", cache.facts
    store, isolates = given_store(config), config.data.isolate_documents
    if store is None:
        raise InputError(
            f"{field}: its samples belong to the rows of a token store, and data.train="
            f"{config.data.train} is none; give the store that it was made with"
        )
    digest, sha256 = TokenStore.open(store).digest, model_fingerprint(teacher)
    if digest != facts.store_digest:
        raise InputError(
            f"{field}: drawn for the rows of another store (digest {facts.store_digest[:12]}) than "
            f"data.train={store} ({digest[:12]}); use that store, or run python -m jobs.teach "
            "with this one"
        )
    if sha256 != facts.teacher_sha256:
        raise InputError(
            f"{field}: drawn from another teacher (fingerprint {facts.teacher_sha256[:12]}) than "
            f"{teacher} ({sha256[:12]}); use that one, or run python -m jobs.teach with this one"
        )
    if facts.temperature != config.distill.temperature:
        raise InputError(
            f"{field}: drawn at temperature {facts.temperature:g}, and distill.temperature="
            f"{config.distill.temperature:g}; use distill.temperature={facts.temperature:g}, or "
            f"run python -m jobs.teach with teach.temperature={config.distill.temperature:g}"
        )
    if facts.isolate_documents != isolates:
        said, now = str(facts.isolate_documents).lower(), str(isolates).lower()
        raise InputError(
            f"{field}: drawn with data.isolate_documents={said}, and here it is {now}; use "
            f"data.isolate_documents={said}, or run python -m jobs.teach with "
            f"data.isolate_documents={now}"
        )


def check_words(cache: SampleCache, student: nn.Module) -> None:
    """Require that the student's head has as many ids as the teacher's.

    Raises:
        InputError: it has not.
    """
    found = student.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    if found != cache.facts.num_words:
        raise InputError(
            f"distill: the student has {found} tokens, the teacher of {cache.folder} "
            f"{cache.facts.num_words}; teacher and student must share the vocabulary"
        )


def verify_file(context: WorkerContext, payload: tuple[SampleCache, int]) -> None:
    """One task: hash a file of a cache.

    Raises:
        InputError: it differs from what was written.
    """
    cache, index = payload
    cache.verify_shard(cache.shards[index])


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
