"""On every worker: quantise the sparse model's layers block by block; rank 0 packs them."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cluster.runtime.worker import WorkerContext
from conf.options.quantize import QuantizeConfig
from jobs.corpus.rows import load_rows
from jobs.runs.folder import disk_errors
from jobs.workers.placement import placed, walk_sizes
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.formats.kinds.packed import Fragments, publish_fragments, save_packed_folder
from sparsify.formats.source import masks_of_source, open_source
from sparsify.formats.verify import check_packed
from sparsify.models.blocks import reason_to_hold_whole
from sparsify.models.load import load_pair, load_tokenizer
from sparsify.quantization.quantize import quantize_checkpoint, quantize_model
from sparsify.quantization.schemes import get_scheme


def quantize_on_worker(context: WorkerContext, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """On every worker: quantise the model block by block, each from where it was left; rank 0
    writes the packed folder.

    Returns:
        The layers' reports as plain values.
    """
    torch.set_num_threads(context.num_threads)
    config, sparse, folder = payload["config"], payload["sparse"], payload["folder"]
    settings: QuantizeConfig = config.quantize
    is_fixed = settings.reduction == "fixed"
    comm = Comm.distributed(is_fixed) if context.world_size > 1 else Comm.single(is_fixed)
    tokenizer = load_tokenizer(sparse)
    rows, warning = load_rows(
        config.data, "calibration", tokenizer, settings.num_samples, config.run.seed
    )
    if warning:
        context.warn(warning)
    source = open_source(sparse, config.model.dtype)
    masks, pattern = masks_of_source(source, config.prune.pattern, config.prune.skip)
    common: dict[str, Any] = {
        "comm": comm, "skip": settings.skip,
        "on_block": lambda done, total: context.progress(done, total, f"blocks, {settings.scheme}"),
    }  # fmt: skip
    if (reason := reason_to_hold_whole(sparse)) is not None:
        context.warn(
            f"quantize: the whole model is held in memory and is not resumable by blocks, because "
            f"{reason}"
        )
        model, _ = load_pair(sparse, config.model.dtype, context.device)
        result = quantize_model(
            model, rows, masks, settings, batch_size=settings.batch_size, **common
        )
        if context.rank == 0:
            with disk_errors(folder):
                save_packed_folder(folder, model, tokenizer, masks, pattern, result.layers, sparse)
        return [asdict(report) for report in result.reports]
    own = walk_sizes(context, config, sparse, rows.num_tokens, settings.has_teacher)
    memory = Memory(
        settings.batch_size, config.model.dtype, context.device, attention=settings.attention
    )
    memory = placed(comm, own, settings.activations, memory)
    scratch = payload["scratch"] / "blocks"
    with disk_errors(payload["scratch"]):
        reports = quantize_checkpoint(
            sparse, scratch, rows, masks, pattern, settings, memory=memory,
            checkpoint_every_blocks=settings.checkpoint_every_blocks, clock=time.monotonic,
            **common,
        )  # fmt: skip
        if context.rank == 0:
            scheme = get_scheme(settings.scheme)
            fragments = Fragments(scratch, lambda width: scheme.stored_as(settings, width))
            publish_fragments(folder, source, masks, pattern, tokenizer, fragments)
    return [asdict(report) for report in reports]


def publish_on_worker(context: WorkerContext, payload: dict[str, Any]) -> None:
    """One task: the packed folder of a model whose layers were quantised while it was pruned.

    Args:
        payload: config, sparse, folder (to make), and codes, the folder with the packed layers.
    """
    torch.set_num_threads(context.num_threads)
    config, sparse = payload["config"], payload["sparse"]
    settings: QuantizeConfig = config.quantize
    scheme = get_scheme(settings.scheme)
    source = open_source(sparse, config.model.dtype)
    masks, pattern = masks_of_source(source, config.prune.pattern, config.prune.skip)
    fragments = Fragments(payload["codes"], lambda width: scheme.stored_as(settings, width))
    with disk_errors(payload["folder"]):
        tokenizer = load_tokenizer(sparse)
        publish_fragments(payload["folder"], source, masks, pattern, tokenizer, fragments)


def check_result(folder: Path) -> dict[str, int]:
    """On the driver: whether every pruned weight of what was written is zero; its counts."""
    return check_packed(folder)
