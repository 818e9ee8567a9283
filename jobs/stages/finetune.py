"""Stage finetune: the sparse model learns a task from records or text, the zeros held."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.preempt import SignalRelay
from conf.schema import Config
from jobs.reporting.wording import training_words
from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext, fingerprints
from jobs.runs.hub import model_folder
from jobs.runs.models import Models
from jobs.runs.stage import Stage
from sparsify.errors import InputError


def _workers() -> tuple[Any, Any]:
    """What the stage does on workers, and how it looks at its inputs."""
    from jobs.workers import finetune, finetune_inputs  # cost torch

    return finetune, finetune_inputs


def base_of(models: Models) -> tuple[Path, bool]:
    """The model to train, and whether it is dense: where none was pruned, the run's dense one, or
    what another stage made of it."""
    is_dense = not any(models.made.get(stage) for stage in ("prune", "distill"))
    try:
        return models.sparse("finetune"), is_dense
    except InputError:  # no stage has made anything
        return models.dense, True


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the fine-tuned weights."""
    student, is_dense = base_of(context.models)
    settings = context.settings("finetune", "data")
    # What they hold is an input.
    for name in ("data", "heldout", "teacher", "template", "adapter_from"):
        settings["finetune"].pop(name)
    masks = {} if is_dense else context.given_masks(student)
    teacher = _teacher(context.config)
    folders = {"student": student, **({} if teacher is None else {"teacher": teacher})}
    return {
        "config": {**settings, **masks, "run.seed": context.config.run.seed},
        "inputs": {**fingerprints(folders), **_workers()[1].input_digests(context.config, student)},
    }


def _teacher(config: Config) -> Path | None:
    text = config.finetune.teacher
    return None if text is None else model_folder("finetune.teacher", text, True)


def _worker_config(context: StageContext) -> Config:
    """For workers, which may be elsewhere: every path from the root, the source in data.train."""
    own, inputs = copy(context.worker_config), _workers()[1]
    settings, data = own.finetune, own.data
    own.finetune = replace(
        settings, heldout=inputs.absolute_source(settings.heldout),
        template=inputs.absolute_template(settings.template),
    )  # fmt: skip
    own.data = replace(data, train=inputs.absolute_source(settings.data) or data.train)
    return own


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Make the rows once, train on all workers, check the zeros of what was written."""
    worker, inputs = _workers()
    student, is_dense = base_of(context.models)
    payload = worker.make_payload(
        _worker_config(context), student, is_dense, context.models.dense,
        _teacher(context.config), inputs.form_of(context.config), writer, context.run_dir,
    )  # fmt: skip
    for line in inputs.memory_lines(context.config, context.models.dense):
        context.display.say(f"finetune: {line}")
    cluster = context.cluster
    if not worker.has_rows(payload):
        cluster.run_tasks("finetune", worker.prepare_rows, [payload], "sources tokenised")
    with SignalRelay(context.run_dir, context.display.say):
        figures = cluster.run_workers(
            "finetune", worker.finetune_on_worker, payload, writer.train_storage
        )
    return {**figures, "gate": worker.check_result(writer.folder / worker.MODEL, is_dense)}


def check(config: Config, models: Models) -> None:
    """Require records of one form that the template renders, and a model and teacher that fit.

    Raises:
        InputError: one of them is not so.
    """
    _workers()[1].check_finetune(config, models.dense)


def describe(config: Config, models: Models) -> list[str]:
    """Form, number and one example of the records."""
    found: list[str] = _workers()[1].describe_records(config, models.dense)
    return found


STAGE = Stage(
    "finetune", "the model that learned a task, its zeros held", identity, run, check=check,
    describe=describe, told=training_words, makes=lambda _: {"finetuned": "model"},
    resumes="continues after its last checkpoint",
)  # fmt: skip
