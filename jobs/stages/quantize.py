"""Stage quantize: the best sparse model in few bits, every zero in place, packed and scored."""

from __future__ import annotations

from typing import Any

from conf.schema import Config
from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext, fingerprints
from jobs.runs.models import Models
from jobs.runs.stage import Stage
from jobs.stages import evaluate


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
    from jobs.workers.quantize import check_result, quantize_on_worker  # costs torch

    packed = writer.folder / "packed"
    payload = {
        "config": context.worker_config, "sparse": context.models.sparse("quantize"),
        "folder": packed, "scratch": writer.scratch,
    }  # fmt: skip
    layers = context.cluster.run_workers(
        "quantize", quantize_on_worker, payload, writer.train_storage
    )
    gate = check_result(packed)
    settings = context.config.quantize
    results = evaluate.score(context, {f"recovered_{settings.scheme}": packed}, "quantize")
    return {
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


def check(config: Config, models: Models) -> None:
    """Require options that the scheme has, and globs that name layers.

    Raises:
        InputError: it has not, or one names none.
    """
    from jobs.workers.checks import check_quantize  # costs torch

    check_quantize(config, models.dense)


STAGE = Stage(
    "quantize", "the sparse model in few bits, packed and scored", identity, run, check=check,
    makes=lambda _: {"packed": "packed"}, is_end=True,
    resumes="continues after the last block whose state is on disk",
)  # fmt: skip
