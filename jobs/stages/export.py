"""Stage export: folders of the best model so far, to load, serve and share."""

from __future__ import annotations

from typing import Any

from conf.schema import Config
from jobs.reporting.results import quantized_as
from jobs.reporting.summary import build_summary
from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext, fingerprints
from jobs.runs.models import Models
from jobs.runs.stage import Stage


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the exported files."""
    models = context.models
    folders = {"sparse": models.sparse("export"), "dense": models.dense}
    if "quantize" in models.made:
        folders["int4"] = models.made["quantize"]["packed"]  # whatever its bits: records have it so
    masks = context.given_masks(folders["sparse"])
    return {"config": {**context.settings("export"), **masks}, "inputs": fingerprints(folders)}


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Write the folders in one task; check the zeros of the files, and time small models."""
    from jobs.workers.export import export_on_worker  # costs torch

    models = context.models
    name, source = models.latest("export")
    summary = build_summary(context.run_dir, context)
    names = [row["name"] for row in summary["results"] if quantized_as(row["name"])]
    payload = {
        "config": context.worker_config, "name": name, "source": source, "dense": models.dense,
        "folder": writer.folder, "packed": None,
        "results": summary["results"], "tasks": summary["tasks"],
        "quantized": names[-1] if names else None,
    }  # fmt: skip
    if "quantize" in models.made:
        payload["packed"] = models.made["quantize"]["packed"]
    return dict(context.cluster.run_tasks("export", export_on_worker, [payload], "exports")[0])


def check(config: Config, models: Models) -> None:
    """Require a model with zeros.

    Raises:
        InputError: it only lost layers.
    """
    models.require_zeros(config, "export")


STAGE = Stage("export", "folders to load, serve and share", identity, run, check=check)
