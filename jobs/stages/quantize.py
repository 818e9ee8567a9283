"""Stage quantize: the best sparse model in few bits, every zero in place, packed and scored."""

from __future__ import annotations

from typing import Any

from conf.schema import Config
from jobs.runs.artifact import StageWriter, read_whole
from jobs.runs.context import StageContext, fingerprints
from jobs.runs.models import Models
from jobs.runs.stage import Stage
from jobs.stages import evaluate, tasks
from sparsify.errors import InputError


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the codes, and the score of the result."""
    folders = {"sparse": context.models.sparse("quantize"), "dense": context.models.dense}
    return {
        "config": {
            **context.settings("quantize"),
            **evaluate.settings(context),
            **context.given_masks(folders["sparse"]),
            "run.seed": context.config.run.seed,
        },
        "inputs": {
            **fingerprints(folders),
            "calibration": context.source_fingerprint("calibration"),
            "heldout": context.source_fingerprint("heldout"),
        },
    }


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Quantise on all workers, check the packed file's zeros, score the model read back from it."""
    from jobs.workers.quantize import (  # costs torch
        check_result,
        publish_on_worker,
        quantize_on_worker,
    )

    settings, sparse = context.config.quantize, context.models.sparse("quantize")
    packed = writer.folder / "packed"
    payload = {
        "config": context.worker_config, "sparse": sparse, "folder": packed,
        "scratch": writer.scratch, "codes": sparse.parent / "codes",
    }  # fmt: skip
    if settings.one_pass:
        context.cluster.run_tasks("quantize", publish_on_worker, [payload], "models")
        layers = _rounded(read_whole(sparse.parent)["metrics"])
    else:
        layers = context.cluster.run_workers(
            "quantize", quantize_on_worker, payload, writer.train_storage
        )
    gate = check_result(packed)
    name = f"{'one_pass' if settings.one_pass else 'recovered'}_{settings.scheme}"
    results = evaluate.score(context, {name: packed}, "quantize")
    folders = {"dense": context.models.dense, name: packed}
    return {
        **tasks.score_tasks(context, writer, folders, "quantize"),
        "results": results,
        "gate": gate,
        "packed_bytes": sum(path.stat().st_size for path in packed.glob("*.safetensors")),
        "quantization": {
            "method": settings.method,
            "scheme": settings.scheme,
            "group_size": settings.group_size,
            "symmetric": settings.symmetric,
            "layers": layers,
        },
    }


def _rounded(pruned: dict[str, Any]) -> list[dict[str, Any]]:
    """Reports of layers that were quantised while they were pruned, as quantising has them."""
    return [
        {
            **{key: layer[key] for key in ("name", "block", "shape", "num_tokens", "damping")},
            "error": layer["rounding_error"],
            "relative_error": _share(layer["rounding_error"], layer["error"])
            * layer["relative_error"],
        }
        for layer in pruned["layers"]
        if layer.get("rounding_error") is not None
    ]


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def check(config: Config, models: Models) -> None:
    """Require options that the scheme has, globs that name layers, and in one pass a pruning that
    quantises.

    Raises:
        InputError: one is missing, or the model has no zeros.
    """
    from jobs.workers.checks import check_quantize  # costs torch

    models.require_zeros(config, "quantize")
    check_quantize(config, models.dense)
    tasks.check(config, models)
    if not config.quantize.one_pass:
        return
    if "distill" in config.stages:
        raise InputError(
            "quantize.one_pass=true: a recovery would change the weights that are quantised while "
            "they are pruned; leave distill out of stages, or one_pass"
        )
    if "prune" in config.stages:
        return
    name, folder = models.latest("quantize")
    if not (folder.parent / "codes").is_dir() or name not in models.made.get("prune", {}):
        raise InputError(
            f"quantize.one_pass=true: {folder} was not quantised while it was pruned; add prune to "
            "stages, or leave one_pass out"
        )


STAGE = Stage(
    "quantize", "the sparse model in few bits, packed and scored", identity, run, check=check,
    makes=lambda _: {"packed": "packed"}, is_end=True,
    resumes="continues after the last block whose state is on disk",
)  # fmt: skip
