"""Stage pretrain: a dense model from random weights, which other runs start from."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

from cluster.preempt import SignalRelay
from conf.schema import Config
from jobs.reporting.wording import training_words
from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext
from jobs.runs.models import Models
from jobs.runs.stage import Stage
from jobs.stages import evaluate


def _workers() -> tuple[Any, Any]:
    """What the stage does on workers, and how it looks at its inputs."""
    from jobs.workers import pretrain, pretrain_inputs  # cost torch

    return pretrain, pretrain_inputs


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the weights and their score."""
    settings = context.settings("pretrain", "data")
    given = _workers()[1].input_digests(context.config)
    for name in ("config", "tokenizer"):  # what they hold is an input
        settings["pretrain"].pop(name)
    train = {} if "train" in given else {"train": context.source_fingerprint("train")}
    return {
        "config": {**evaluate.settings(context), **settings},
        "inputs": {**train, "heldout": context.source_fingerprint("heldout"), **given},
    }


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Make the rows and the first weights, train on all workers, score what was written."""
    worker, _ = _workers()
    payload = worker.make_payload(_worker_config(context), writer, context.run_dir)
    cluster = context.cluster
    if not worker.is_prepared(payload):
        what = "tokenizers, first weights and rows made"
        cluster.run_tasks("pretrain", worker.prepare, [payload], what)
        worker.distill.tokenize_in_shards("pretrain", payload, cluster, context.display)
    with SignalRelay(context.run_dir, context.display.say):
        figures = cluster.run_workers(
            "pretrain", worker.pretrain_on_worker, payload, writer.train_storage
        )
    folder = writer.folder / worker.MODEL
    figures["gate"] = worker.check_result(folder)
    scored = replace(context, models=Models(folder, context.models.stages))
    figures["results"] = evaluate.score(scored, {"dense": folder}, "pretrain")
    worker.write_card(folder, context.config, figures, context.command)
    return dict(figures)


def _worker_config(context: StageContext) -> Config:
    """For workers, which may be elsewhere: folders that are here by their paths from the root."""
    own, inputs = copy(context.worker_config), _workers()[1]
    settings = own.pretrain
    found = inputs.config_folder(settings), inputs.tokenizer_folder(settings)
    names = [None if folder is None else str(folder) for folder in found]
    own.pretrain = replace(settings, config=names[0], tokenizer=names[1])
    return own


def check(config: Config, models: Models) -> None:
    """Require sizes, a tokenizer and rows that fit each other, and cards that have room.

    Raises:
        InputError: one of them is not so.
    """
    _workers()[1].check_pretrain(config)


def describe(config: Config, models: Models) -> list[str]:
    """The model, its tokenizer, the tokens and what they cost."""
    found: list[str] = _workers()[1].describe_pretrain(config)
    return found


STAGE = Stage(
    "pretrain", "a dense model from random weights", identity, run, check=check,
    describe=describe, told=training_words, resumes="continues after its last checkpoint",
)  # fmt: skip
