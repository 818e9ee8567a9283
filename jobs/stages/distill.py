"""Stage distill: the pruned model recovers by learning from the dense one."""

from __future__ import annotations

from typing import Any

from cluster.preempt import SignalRelay
from conf.schema import Config
from jobs.reporting.wording import training_words
from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext, fingerprints
from jobs.runs.models import Models
from jobs.runs.stage import Stage


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the recovered weights."""
    from jobs.training.inputs import given_digests  # costs torch

    student, settings = context.models.sparse("distill"), context.settings("distill", "data")
    settings["distill"].pop("teacher_cache")  # where it lies; what it holds is an input
    given = given_digests(context.config)
    return {
        "config": {
            **settings,
            **context.given_masks(student),
            "run.seed": context.config.run.seed,
        },
        "inputs": {
            **context.heldout_inputs(),
            **fingerprints({"student": student, "teacher": context.models.dense}),
            **({} if "train" in given else {"train": context.source_fingerprint("train")}),
            **given,
        },
    }


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Tokenise once, train on all workers, check the zeros of what was written."""
    from jobs.workers import distill as worker  # costs torch

    student, teacher = context.models.sparse("distill"), context.models.dense
    payload = worker.make_payload(context.worker_config, student, teacher, writer, context.run_dir)
    cluster = context.cluster
    if not worker.has_rows(payload):
        cluster.run_tasks("distill", worker.prepare_rows, [payload], "sources tokenised")
        worker.tokenize_in_shards("distill", payload, cluster, context.display)
    if (cache := payload["cache"]) is not None:
        files = [(cache, index) for index in range(len(cache.shards))]
        cluster.run_tasks("distill", worker.verify_file, files, "files of the teacher's cache read")
    with SignalRelay(context.run_dir, context.display.say):
        figures = cluster.run_workers(
            "distill", worker.distill_on_worker, payload, writer.train_storage
        )
    gate = worker.check_result(writer.folder / "model")
    return {**figures, "gate": gate, "is_teacher_rotated": payload["rotation"] is not None}


def check(config: Config, models: Models) -> None:
    """Require a family that can be trained, stored rows and samples that fit this run, and cards
    that have room for it.

    Raises:
        InputError: one of them is not so.
    """
    from jobs.workers.checks import check_distill  # costs torch

    check_distill(config, models.dense)


STAGE = Stage(
    "distill", "the recovered model", identity, run, check=check,
    makes=lambda _: {"recovered": "model"}, told=training_words,
    resumes="continues after its last checkpoint",
)  # fmt: skip
