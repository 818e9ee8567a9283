"""Prune: one-shot pruning of the dense model, with each asked method, on all workers.

`python -m jobs.prune` runs the whole pipeline (jobs/pipeline.py); this module is its first stage.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from jobs._artifact import StageWriter
    from jobs._stage import StageContext


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the pruned weights."""
    from jobs._sources import source_fingerprint
    from jobs._stage import fingerprints, heldout_inputs

    config = context.config
    data = context.settings("data")["data"]
    return {
        "config": {
            **context.settings("prune"),
            "model.dtype": config.model.dtype,
            "data": {k: v for k, v in data.items() if k != "train"},
            "run.seed": config.run.seed,
        },
        "inputs": {
            **heldout_inputs(context),
            **fingerprints({"model": context.models.dense}),
            "calibration": source_fingerprint(config.data, "calibration"),
        },
    }


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Prune with the baselines and the main method; one model folder each."""
    from jobs._artifact import take_json

    config = context.config
    main_method = config.prune.method
    methods = [name for name in config.prune.baselines if name != main_method] + [main_method]
    payload = {
        "config": context.worker_config, "dense": context.models.dense, "methods": methods,
        "folder": writer.folder,
    }  # fmt: skip
    context.cluster.run_workers("prune", prune_on_worker, payload, writer.train_storage)
    return {
        "method": config.prune.method,
        "methods": methods,
        "pattern": config.prune.pattern,
        **take_json(writer.folder / "figures.json"),
        "gate": {method: _gate(writer.folder / method) for method in methods},
    }


def _gate(folder: Path) -> dict[str, int]:
    from jobs._gate import check_files, masks_of

    masks, pattern = masks_of(folder)
    return check_files(folder, masks, pattern)


def prune_on_worker(context: WorkerContext, payload: dict[str, Any]) -> None:
    """On every worker: prune a fresh copy of the dense model per method; rank 0 writes."""
    import torch

    from jobs._artifact import disk_errors, model_fingerprint, write_json
    from jobs._sources import load_rows
    from jobs._stage import MASKS, write_sparsity
    from sparsify.comm import Comm
    from sparsify.masks import save_masks
    from sparsify.methods import PruneParams, get_method
    from sparsify.models.load import check_sequence_length, load_pair, save_model
    from sparsify.pack import packed_num_bytes
    from sparsify.pattern import Pattern
    from sparsify.prune import prune_model

    torch.set_num_threads(context.num_threads)
    config, folder = payload["config"], payload["folder"]
    settings = config.prune
    comm = Comm.distributed() if context.world_size > 1 else Comm.single()
    pattern = Pattern.parse(settings.pattern)
    params = PruneParams(damping=settings.damping, block_size=settings.block_size)
    model, tokenizer = load_pair(payload["dense"], config.model.dtype, context.device)
    check_sequence_length(model.config, config.data.sequence_length)
    rows, warning = load_rows(
        config.data, "calibration", tokenizer, settings.num_samples, config.run.seed
    )
    if warning:
        context.warn(warning)
    provenance = {
        "dense_path": str(payload["dense"].resolve()),
        "dense_sha256": model_fingerprint(payload["dense"]),
        "num_calibration_tokens": rows.numel(),
        "seed": config.run.seed,
    }
    layers, packed_bytes = [], {}
    for index, name in enumerate(payload["methods"]):
        if index > 0:
            model, _ = load_pair(payload["dense"], config.model.dtype, context.device)

        def on_block(done: int, total: int, index: int = index, name: str = name) -> None:
            blocks = total * len(payload["methods"])
            context.progress(index * total + done, blocks, f"blocks, {name}")

        result = prune_model(
            model, rows, get_method(name), pattern, params,
            comm=comm, batch_size=settings.batch_size, skip=settings.skip, on_block=on_block,
        )  # fmt: skip
        for report in result.layers:
            layers.append({"method": name, **asdict(report)})
            context.metrics({f"prune/{name}/relative_error": report.relative_error}, len(layers))
        if context.rank == 0:
            with disk_errors(folder):
                save_model(model, tokenizer, folder / name)
                save_masks(folder / name / MASKS, result.keep_masks)
                packed_bytes[name] = packed_num_bytes(
                    model.state_dict(), result.keep_masks.keys(), pattern
                )
                write_sparsity(folder / name, result.keep_masks, settings.pattern, name, provenance)
    if context.rank == 0:
        write_json(folder / "figures.json", {"layers": layers, "packed_bytes": packed_bytes})


if __name__ == "__main__":
    from jobs._entry import main

    main("prune")
