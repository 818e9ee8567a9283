"""Quantise the sparse model to INT4: zeros stay zeros, the packed file is what gets scored."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from jobs._artifact import StageWriter
    from jobs._stage import StageContext


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the codes, and the score of the result."""
    from jobs import evaluate
    from jobs._sources import source_fingerprint
    from jobs._stage import fingerprints, given_masks

    config = context.config
    folders = {"sparse": context.models.sparse("quantize"), "dense": context.models.dense}
    return {
        "config": {
            **context.settings("quantize"),
            **evaluate.settings(context),
            **given_masks(config, folders["sparse"]),
            "run.seed": config.run.seed,
        },
        "inputs": {
            **fingerprints(folders),
            "calibration": source_fingerprint(config.data, "calibration"),
            "heldout": evaluate.heldout_fingerprint(context),
        },
    }


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Quantise on all workers, check the packed file's zeros, score the model read back from it."""
    from jobs import evaluate
    from jobs._artifact import take_json
    from jobs._gate import check_packed
    from jobs._stage import PACKED

    packed = writer.folder / "packed"
    payload = {
        "config": context.worker_config, "sparse": context.models.sparse("quantize"),
        "folder": writer.folder,
    }  # fmt: skip
    context.cluster.run_workers("quantize", quantize_on_worker, payload, writer.train_storage)
    layers = take_json(writer.folder / "layers.json")
    gate = check_packed(packed)
    settings = context.config.quantize
    folders = {f"recovered_int{settings.bits}": packed}
    results = evaluate.score(
        context.cluster, context.worker_config, context.models.dense, folders, "quantize"
    )
    return {
        "results": results,
        "gate": gate,
        "packed_bytes": (packed / PACKED).stat().st_size,
        "quantization": {
            "method": settings.method,
            "bits": settings.bits,
            "group_size": settings.group_size,
            "layers": layers,
        },
    }


def quantize_on_worker(context: WorkerContext, payload: dict[str, Any]) -> None:
    """On every worker: quantise the model block by block; rank 0 writes the packed folder."""
    import torch

    from jobs._artifact import disk_errors, write_json
    from jobs._gate import masks_of
    from jobs._packed import save_packed_folder
    from jobs._sources import load_rows
    from sparsify.comm import Comm
    from sparsify.models.load import load_pair
    from sparsify.quantize import QuantParams, quantize_model

    torch.set_num_threads(context.num_threads)
    config, folder = payload["config"], payload["folder"]
    settings = config.quantize
    comm = Comm.distributed() if context.world_size > 1 else Comm.single()
    model, tokenizer = load_pair(payload["sparse"], config.model.dtype, context.device)
    masks, pattern = masks_of(payload["sparse"], model, config.prune)
    rows, warning = load_rows(
        config.data, "calibration", tokenizer, settings.num_samples, config.run.seed
    )
    if warning:
        context.warn(warning)
    params = QuantParams(
        method=settings.method, bits=settings.bits, group_size=settings.group_size,
        damping=settings.damping,
    )  # fmt: skip
    result = quantize_model(
        model, rows, masks, params, comm=comm, batch_size=settings.batch_size,
        on_block=lambda done, total: context.progress(done, total, f"blocks, {settings.method}"),
    )  # fmt: skip
    if context.rank != 0:
        return
    with disk_errors(folder):
        save_packed_folder(
            folder / "packed", model, tokenizer, masks, pattern, result.layers, payload["sparse"]
        )
    write_json(folder / "layers.json", [asdict(report) for report in result.reports])


if __name__ == "__main__":
    from jobs._entry import main

    main("quantize")
