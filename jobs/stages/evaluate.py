"""Stage evaluate: every model so far on the same held-out rows and tasks, against the dense one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from conf.options.evaluate import OF_TASKS
from jobs.runs.artifact import StageWriter, read_record, read_whole
from jobs.runs.context import StageContext, fingerprints
from jobs.runs.folder import read_json, write_json
from jobs.runs.stage import Stage
from jobs.stages import tasks

_SCORED = "results.json"
"""below `scratch`: scores on text, with what decided them; tasks take hours"""


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the scores."""
    return {"config": settings(context), "inputs": {**fingerprints(_models(context)),
            "heldout": context.source_fingerprint("heldout"), **tasks.inputs(context)}}  # fmt: skip


def settings(context: StageContext) -> dict[str, Any]:
    """The part of the config that decides a score on text, for identities."""
    data = context.settings("data")["data"]
    given = context.settings("evaluate")["evaluate"]
    return {
        "evaluate": {key: value for key, value in given.items() if key not in OF_TASKS},
        "run.seed": context.config.run.seed,  # of what the models write
        "model.dtype": context.config.model.dtype,
        "data": {k: v for k, v in data.items() if k != "train"},
    }


def _models(context: StageContext) -> dict[str, Path]:
    dense = context.models.dense
    sparse = {n: path for n, path in context.models.all_sparse().items() if path != dense}
    known = {"dense": dense, **sparse}
    # Where this command quantises too, that stage scores what it makes.
    if context.config.evaluate.tasks and "quantize" not in context.config.stages:
        known |= _quantized(context)
    return known


def _quantized(context: StageContext) -> dict[str, Path]:
    """The quantised model, if there is one, by the name of its result."""
    made = context.models.made.get("quantize")
    if not made:
        return {}
    name = next(iter(read_whole(made["packed"].parent)["metrics"]["results"]))
    return {name: made["packed"]}


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Score every model there is; dense first."""
    folders, decides = _models(context), _without_tasks(writer.identity)
    results = _scored_before(context, writer, decides)
    if results is None:
        results = score(context, folders, "evaluate")
        write_json(writer.scratch / _SCORED, {"identity": decides, "results": results})
    asked = {**folders, **_quantized(context)}
    return {"results": results, **tasks.score_tasks(context, writer, asked, "evaluate")}


def _scored_before(
    context: StageContext, writer: StageWriter, decides: dict[str, Any]
) -> dict[str, Any] | None:
    """Scores on text that were there when tasks were still asked, or more of them are asked."""
    with contextlib.suppress(FileNotFoundError):
        scored = read_json(writer.scratch / _SCORED, "delete it and run the same command again")
        if scored["identity"] == decides:
            return dict(scored["results"])
    folder = context.run_dir / "evaluate"
    if {"evaluate", "all"} & set(context.config.run.redo) or not folder.is_dir():
        return None
    record = read_record(folder)
    if _without_tasks(record["identity"]) != decides:
        return None
    return dict(record["metrics"]["results"])


def _without_tasks(identity: dict[str, Any]) -> dict[str, Any]:
    """What of an identity decides scores on text."""
    inputs = {name: value for name, value in identity["inputs"].items() if name != "tasks"}
    return {**identity, "inputs": inputs}


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
    window = context.config.data.sequence_length
    return {
        name: {**total(of_model), "window_tokens": window}
        for name, *of_model in zip(folders, *parts, strict=True)
    }


STAGE = Stage(
    "evaluate", "perplexity of every model so far", identity, run, check=tasks.check,
    may_extend=True, resumes="starts over, but for benchmark tasks that are answered",
)  # fmt: skip
