"""On workers: benchmark tasks built, and asked of one model after another."""

from __future__ import annotations

from typing import Any

import torch

from cluster.runtime.worker import WorkerContext
from jobs.harness.results import kept_path
from jobs.harness.run import build, language_model, release, run_task
from jobs.runs.folder import write_json


def build_tasks(context: WorkerContext, payload: dict[str, Any]) -> dict[str, int]:
    """One task: build every benchmark task, and so fetch its data; name -> documents."""
    sizes = {}
    for done, task in enumerate(payload["tasks"], 1):
        sizes[task.name] = len(build(task).eval_docs)
        context.progress(done, len(payload["tasks"]))
    return sizes


def answer_tasks(context: WorkerContext, payload: dict[str, Any]) -> None:
    """One task: ask a model some benchmark tasks, and write each result when it is there."""
    torch.set_num_threads(context.num_threads)
    settings, name, scratch = payload["settings"], payload["model"], payload["scratch"]
    model = language_model(
        payload["folder"], payload["dense"], payload["dtype"], context.device, settings
    )
    num_tasks, steps = len(payload["tasks"]), payload["steps"]
    for place, (task, num_fewshot, key) in enumerate(payload["tasks"]):

        def tell(share: float, place: int = place) -> None:
            context.progress(round((place + share) * steps / num_tasks, 2), steps)

        answers = scratch / "answers" / f"{key}.db"
        result = run_task(model, task, num_fewshot, settings, answers, tell)
        path = kept_path(scratch, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "model": name, **result})
        answers.unlink()
        tell(1.0)
    release(model)
