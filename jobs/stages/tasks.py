"""Benchmark tasks as part of a stage: what is asked of which model, what is known, the table.

Each result is one file in the stage's folder, whole or absent, kept with the key of what decided
it: an interrupted stage goes on with the tasks that are left, and a stage that is made again for
another model or task asks nothing that was answered before.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from conf.schema import Config
from jobs.harness.plan import Plan, planned
from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext, fingerprints
from jobs.runs.folder import write_json
from jobs.runs.models import Models

Asked = dict[tuple[str, str], str]
"""(model, task) -> key of the result"""

_PIECES_PER_WORKER = 3
"""pieces of work for each worker, as far as there are tasks: loading a model costs, and so do idle
workers at the end"""


def plan_of(config: Config) -> Plan:
    """What `evaluate.tasks` asks for.

    Raises:
        InputError: see `jobs.harness.plan.planned`.
    """
    options = config.evaluate
    return planned(options.tasks, options.num_fewshot, options.allow_task_code)


def check(config: Config, models: Models) -> None:
    """Require tasks that there are, with their data where they are local, and models that fit them.

    Raises:
        InputError: see `planned` and `jobs.workers.task_checks.check_tasks`.
    """
    if config.evaluate.tasks:
        from jobs.workers.task_checks import check_tasks  # costs torch

        check_tasks(config, models, plan_of(config))


def inputs(context: StageContext) -> dict[str, Any]:
    """For identities: what decides the answers to each task, whatever the model."""
    if not context.config.evaluate.tasks:
        return {}
    plan, given = plan_of(context.config), context.settings("evaluate")["evaluate"]
    names = ("limit", "apply_chat_template", "task_batch_size", "max_length", "backend")
    return {
        "tasks": {
            **{f"evaluate.{name}": given[name] for name in names},
            "lm_eval": metadata.version("lm_eval"),
            **{
                name: f"{task.digest} {plan.num_fewshot[name]}" for name, task in plan.tasks.items()
            },
        }
    }


def score_tasks(
    context: StageContext, writer: StageWriter, folders: dict[str, Path], stage: str
) -> dict[str, Any]:
    """Results of every task for every model, and the table that compares them.

    Args:
        context: the run.
        writer: of the stage, whose folder gets `tasks/<model>/<task>.json`, and `kept/<key>.json`
            of results that it had before and that nobody asks for now.
        folders: name -> model folder, the dense one first.
        stage: for whom; shown with the progress.

    Returns:
        `tasks` with `settings` and `rows`, as summary.json has them (docs/run-folder.md); nothing
        where there are no tasks.
    """
    from jobs.harness.results import (  # costs torch
        Comparison,
        all_results,
        kept_path,
        keys_of,
        result_path,
        settings_of,
    )

    config, finished = context.config, _finished(context, stage)
    own = all_results([writer.scratch, *(path for path in finished if path.name == stage)])
    keys: Asked = {}
    found: dict[str, Any] = {}
    if config.evaluate.tasks:
        plan = plan_of(config)
        settings = settings_of(config, context.models.dense, list(folders.values()))
        keys = keys_of(plan, fingerprints(folders), settings)
        known = all_results(finished) | own
        left = {key: pair for pair, key in keys.items() if key not in known}  # equal models once
        if left:
            asked = {pair: key for key, pair in left.items()}
            _ask(context, plan, asked, folders, settings, writer.scratch, stage)
            known |= all_results([writer.scratch])
        records: dict[str, dict[str, Any]] = {model: {} for model in folders}
        for (model, name), key in keys.items():
            records[model][name] = {**known[key], "model": model}
            _write(result_path(writer.folder, model, name), records[model][name])
        rows = Comparison(records, config.run.seed).table(plan.rows)
        lm_eval = {"lm_eval": metadata.version("lm_eval")}
        found = {"tasks": {"settings": {**settings, **lm_eval}, "rows": rows}}
    for key in own.keys() - keys.values():
        _write(kept_path(writer.folder, key), own[key])
    return found


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def _finished(context: StageContext, stage: str) -> list[Path]:
    """Folders of this run's finished stages whose results count; not of what is made again."""
    is_redone = {stage, "all"} & set(context.config.run.redo)
    names = ["evaluate", "quantize"] if not is_redone else ["evaluate"] * (stage == "quantize")
    return [context.run_dir / name for name in names]


def _ask(
    context: StageContext, plan: Plan, asked: Asked, folders: dict[str, Path],
    settings: dict[str, Any], scratch: Path, stage: str,
) -> None:  # fmt: skip
    """Ask what is left on all workers; results go below `scratch`."""
    from jobs.workers.tasks import answer_tasks, build_tasks  # cost the harness, seconds

    # All data are there before the first model is loaded.
    unasked = {name: plan.tasks[name] for _, name in asked}
    payload = {"tasks": list(unasked.values())}
    sizes = context.cluster.run_tasks(stage, build_tasks, [payload], "tasks", len(unasked))[0]
    pieces = _pieces(list(asked), sizes, context.config.cluster.num_workers)
    most = max(len(names) for _, names in pieces)
    payloads = [
        {
            "dtype": context.config.model.dtype, "settings": settings, "model": model,
            "folder": folders[model], "dense": context.models.dense, "scratch": scratch,
            "tasks": [(plan.tasks[n], plan.num_fewshot[n], asked[model, n]) for n in names],
            "steps": most,
        }
        for model, names in pieces
    ]  # fmt: skip
    context.cluster.run_tasks(stage, answer_tasks, payloads, "tasks", most)


def _pieces(
    left: list[tuple[str, str]], sizes: dict[str, int], num_workers: int
) -> list[tuple[str, list[str]]]:
    """(model, tasks) to be asked together, the largest first; as few as keep all workers busy."""
    by_model: dict[str, list[str]] = {}
    for model, name in left:
        by_model.setdefault(model, []).append(name)
    num_parts = max(1, -(-num_workers * _PIECES_PER_WORKER // len(by_model)))
    pieces: list[tuple[int, str, list[str]]] = []
    for model, names in by_model.items():
        parts: list[tuple[int, list[str]]] = [(0, []) for _ in range(min(num_parts, len(names)))]
        for name in sorted(names, key=lambda name: -sizes[name]):
            parts.sort(key=lambda part: part[0])
            size, members = parts[0]
            parts[0] = (size + sizes[name], [*members, name])
        pieces += [(size, model, members) for size, members in parts]
    pieces.sort(key=lambda piece: -piece[0])
    return [(model, members) for _, model, members in pieces]
