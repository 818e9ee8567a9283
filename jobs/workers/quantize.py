"""On every worker: quantise the sparse model's layers; rank 0 packs them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from cluster.runtime.worker import WorkerContext
from conf.options.quantize import QuantizeConfig
from jobs.corpus.rows import load_rows
from jobs.runs.folder import disk_errors
from sparsify.comm import Comm
from sparsify.formats.kinds.packed import save_packed_folder
from sparsify.formats.verify import masks_of
from sparsify.models.load import load_pair
from sparsify.quantization import quantize_model


def quantize_on_worker(context: WorkerContext, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """On every worker: quantise the model block by block; rank 0 writes the packed folder.

    Returns:
        The layers' reports as plain values.
    """
    torch.set_num_threads(context.num_threads)
    config, folder = payload["config"], payload["folder"]
    settings: QuantizeConfig = config.quantize
    comm = Comm.distributed() if context.world_size > 1 else Comm.single()
    model, tokenizer = load_pair(payload["sparse"], config.model.dtype, context.device)
    masks, pattern = masks_of(payload["sparse"], model, config.prune.pattern, config.prune.skip)
    rows, warning = load_rows(
        config.data, "calibration", tokenizer, settings.num_samples, config.run.seed
    )
    if warning:
        context.warn(warning)
    result = quantize_model(
        model, rows, masks, settings, skip=settings.skip, comm=comm, batch_size=settings.batch_size,
        on_block=lambda done, total: context.progress(done, total, f"blocks, {settings.method}"),
    )  # fmt: skip
    if context.rank == 0:
        with disk_errors(folder):
            save_packed_folder(
                folder, model, tokenizer, masks, pattern, result.layers, payload["sparse"]
            )
    return [asdict(report) for report in result.reports]
