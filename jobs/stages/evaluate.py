"""Stage evaluate: every model so far on the same held-out rows, against the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext, fingerprints
from jobs.runs.stage import Stage


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the scores."""
    return {"config": settings(context), "inputs": {**fingerprints(_models(context)),
            "heldout": context.source_fingerprint("heldout")}}  # fmt: skip


def settings(context: StageContext) -> dict[str, Any]:
    """The part of the config that decides a score, for identities."""
    data = context.settings("data")["data"]
    return {
        **context.settings("evaluate"),
        "run.seed": context.config.run.seed,  # of what the models write
        "model.dtype": context.config.model.dtype,
        "data": {k: v for k, v in data.items() if k != "train"},
    }


def _models(context: StageContext) -> dict[str, Path]:
    dense = context.models.dense
    sparse = {n: path for n, path in context.models.all_sparse().items() if path != dense}
    return {"dense": dense, **sparse}


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Score every model there is; dense first."""
    return {"results": score(context, _models(context), "evaluate")}


def score(context: StageContext, folders: dict[str, Path], stage: str) -> dict[str, dict[str, Any]]:
    """Perplexity, KL to the dense model, top-1 agreement and a text of each model folder.

    The rows are shared by as many tasks as there are workers, each of which scores all models; the
    shares' sums are added in a fixed order.

    Args:
        context: the run.
        folders: name -> model folder.
        stage: for whom; shown with the progress.
    """
    from jobs.workers.evaluate import score_share, total  # costs torch

    shares = context.config.cluster.num_workers
    payloads = [
        {
            "config": context.worker_config, "dense": context.models.dense,
            "folders": list(folders.values()), "share": share, "shares": shares,
        }
        for share in range(shares)
    ]  # fmt: skip
    what = "shares of held-out rows"
    parts = context.cluster.run_tasks(stage, score_share, payloads, what, len(folders))
    return {name: total(of_model) for name, *of_model in zip(folders, *parts, strict=True)}


STAGE = Stage("evaluate", "perplexity of every model so far", identity, run, may_extend=True)
