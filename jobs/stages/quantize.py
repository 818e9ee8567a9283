"""Stage quantize: the best sparse model as integers with every zero in place, packed and scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.runs.stage import Stage

if TYPE_CHECKING:
    from jobs.runs.artifact import StageWriter
    from jobs.runs.context import StageContext


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the codes, and the score of the result."""
    from jobs.corpus.sources import source_fingerprint
    from jobs.runs.context import fingerprints, given_masks
    from jobs.stages import evaluate

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
    from jobs.runs.folder import take_json
    from jobs.stages import evaluate
    from jobs.workers.quantize import quantize_on_worker
    from sparsify.formats.sparse_folder import PACKED
    from sparsify.formats.verify import check_packed

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


STAGE = Stage("quantize", "the INT4 model, packed and scored", identity, run)
