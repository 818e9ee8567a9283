"""Stage export: folders of the best model so far, to load, serve and share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.runs.stage import Stage

if TYPE_CHECKING:
    from jobs.runs.artifact import StageWriter
    from jobs.runs.context import StageContext


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the exported files."""
    from jobs.runs.context import fingerprints, given_masks

    models = context.models
    folders = {"sparse": models.sparse("export"), "dense": models.dense}
    if models.packed_int4 is not None:
        folders["int4"] = models.packed_int4
    masks = given_masks(context.config, folders["sparse"])
    return {"config": {**context.settings("export"), **masks}, "inputs": fingerprints(folders)}


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Write the folders in one task; check the zeros of the files and that they load."""
    from jobs.reporting.summary import build_summary
    from jobs.workers.export import export_on_worker

    summary = build_summary(context.run_dir, context)
    payload = {
        "config": context.worker_config, "models": context.models, "folder": writer.folder,
        "results": summary["results"],
    }  # fmt: skip
    return dict(context.cluster.run_tasks("export", export_on_worker, [payload], "exports")[0])


STAGE = Stage("export", "folders to load, serve and share", identity, run)
