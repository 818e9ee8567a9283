"""Stage evaluate: every model so far on the same held-out rows, against the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runs.stage import Stage

if TYPE_CHECKING:
    from cluster.runtime.backend import RayCluster
    from conf.schema import Config
    from jobs.runs.artifact import StageWriter
    from jobs.runs.context import StageContext


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the scores."""
    from jobs.runs.context import fingerprints

    return {"config": settings(context), "inputs": {**fingerprints(_models(context)),
            "heldout": heldout_fingerprint(context)}}  # fmt: skip


def settings(context: StageContext) -> dict[str, Any]:
    """The part of the config that decides a score, for identities."""
    data = context.settings("data")["data"]
    return {
        **context.settings("evaluate"),
        "model.dtype": context.config.model.dtype,
        "data": {k: v for k, v in data.items() if k != "train"},
    }


def heldout_fingerprint(context: StageContext) -> str:
    """Fingerprint of the held-out text."""
    from jobs.corpus.sources import source_fingerprint

    return source_fingerprint(context.config.data, "heldout")


def _models(context: StageContext) -> dict[str, Path]:
    models = context.models
    pruned = {name: path for name, path in models.pruned.items() if path != models.dense}
    found = {"dense": models.dense, **pruned}
    if models.recovered is not None:
        found["recovered"] = models.recovered
    return found


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Score every model there is; dense first."""
    return {"results": score(context.cluster, context.worker_config, context.models.dense,
                             _models(context), "evaluate")}  # fmt: skip


def score(
    cluster: RayCluster, config: Config, dense: Path, folders: dict[str, Path], stage: str
) -> dict[str, dict[str, Any]]:
    """Perplexity, KL to the dense model and top-1 agreement of each model folder.

    Every model's rows are shared by as many Ray tasks as there are workers; the shares' sums are
    added in a fixed order.
    """
    from jobs.workers.evaluate import score_share
    from sparsify.evaluation.perplexity import EvalSums

    shares = config.cluster.num_workers
    payloads = [
        {"config": config, "dense": dense, "folder": folder, "share": share, "shares": shares}
        for folder in folders.values()
        for share in range(shares)
    ]
    parts = cluster.run_tasks(stage, score_share, payloads, "shares of held-out rows")
    results = {}
    for index, name in enumerate(folders):
        sums = EvalSums()
        for part in parts[index * shares : (index + 1) * shares]:
            sums = sums + EvalSums(**part)
        results[name] = {
            "perplexity": sums.perplexity,
            "kl": sums.kl,
            "top1_agreement": sums.top1_agreement,
            "num_tokens": sums.num_tokens,
        }
    return results


STAGE = Stage("evaluate", "perplexity of every model so far", identity, run, may_extend=True)
