"""Stage prune: one-shot pruning of the dense model with each asked method, on all workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schema import Config
from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext, fingerprints
from jobs.runs.models import Models
from jobs.runs.stage import Stage
from sparsify.errors import InputError


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the pruned weights."""
    config = context.config
    data = context.settings("data")["data"]
    return {
        "config": {
            **context.settings("prune"),
            **(context.settings("quantize") if config.quantize.one_pass else {}),
            "model.dtype": config.model.dtype,
            "data": {k: v for k, v in data.items() if k != "train"},
            "run.seed": config.run.seed,
        },
        "inputs": {
            **context.heldout_inputs(),
            **fingerprints(_models(context)),
            "calibration": context.source_fingerprint("calibration"),
        },
    }


def _models(context: StageContext) -> dict[str, Path]:
    """The model to prune, and where it lost layers the one that it is compared with."""
    models = context.models
    more = {} if models.to_prune == models.dense else {"dense": models.dense}
    return {"model": models.to_prune, **more}


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Prune with the baselines and the main method; one model folder each."""
    from jobs.workers.prune import check_result, prune_on_worker  # costs torch

    settings = context.config.prune
    methods = [name for name in settings.baselines if name != settings.method] + [settings.method]
    payload = {
        "config": context.worker_config, "dense": context.models.to_prune, "methods": methods,
        "compared": context.models.dense, "folder": writer.folder, "scratch": writer.scratch,
    }  # fmt: skip
    figures = context.cluster.run_workers("prune", prune_on_worker, payload, writer.train_storage)
    return {
        "method": settings.method,
        "methods": methods,
        "pattern": settings.pattern,
        **figures,
        "gate": {name: check_result(writer.folder / name, settings.pattern) for name in methods},
    }


def check(config: Config, models: Models) -> None:
    """Require that every layer to prune has whole groups of the pattern, and room for the work.

    Raises:
        InputError: a layer's inputs are no multiple of the group's length; or the cluster's cards
            have no room.
    """
    from jobs.workers.checks import check_prune, check_quantize  # costs torch

    check_prune(config, models.dense)
    if config.quantize.one_pass:
        check_quantize(config, models.dense)
        if ":" not in config.prune.pattern or config.prune.pattern.startswith("unstructured"):
            raise InputError(
                f"quantize.one_pass=true: layers are packed as they are quantised, which takes a "
                f"pattern N:M, not prune.pattern={config.prune.pattern}"
            )


STAGE = Stage(
    "prune", "one-shot pruned models, one per method", identity, run, check=check,
    makes=lambda metrics: {name: name for name in metrics["methods"]},
    resumes="continues after the last block whose state is on disk",
)  # fmt: skip
