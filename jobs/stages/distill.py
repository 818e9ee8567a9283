"""Stage distill: the pruned model recovers by learning from the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runs.stage import Stage

if TYPE_CHECKING:
    from cluster.runtime.backend import WorkerContext
    from conf.schema import Config
    from jobs.runs.artifact import StageWriter
    from jobs.runs.context import StageContext

_STORE, _HELDOUT = "rows", "heldout"


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the recovered weights."""
    from jobs.corpus.sources import source_fingerprint
    from jobs.runs.context import fingerprints, given_masks, heldout_inputs
    from jobs.training.teacher_samples import given_store, open_cache
    from sparsify.data.store import TokenStore

    config = context.config
    student = context.models.student("distill")
    given = given_store(config)
    train = TokenStore.open(given).digest if given else source_fingerprint(config.data, "train")
    cache, settings = open_cache(config), context.settings("distill", "data")
    settings["distill"].pop("teacher_cache")  # where it lies; what it holds is an input
    return {
        "config": {
            **settings,
            **given_masks(config, student),
            "run.seed": config.run.seed,
        },
        "inputs": {
            **heldout_inputs(context),
            **fingerprints({"student": student, "teacher": context.models.dense}),
            "train": train,
            **({} if cache is None else {"teacher_cache": cache.digest}),
        },
    }


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Tokenise once, train on all workers, check the zeros of what was written."""
    from cluster.preempt import SignalRelay
    from jobs.runs.folder import take_json
    from jobs.training.teacher_samples import given_store, open_cache, verify_file
    from jobs.workers.distill import distill_on_worker
    from sparsify.data.shards import MANIFEST
    from sparsify.formats.basis import teacher_rotation
    from sparsify.formats.verify import check_files, masks_of

    student, teacher = context.models.student("distill"), context.models.dense
    settings = context.config.distill
    weight = settings.losses().peak("square_head")
    rotation = teacher_rotation(student, teacher, weight, settings.moving_start)
    given = given_store(context.config)
    store = given.absolute() if given else writer.scratch / _STORE
    if given:
        _check_store(given, context.config, teacher)
    cache = open_cache(context.config)
    every = context.config.distill.heldout_every_steps
    heldout = None if every is None else writer.scratch / _HELDOUT
    payload = {
        "config": context.worker_config, "student": student, "teacher": teacher,
        "rotation": rotation, "folder": writer.folder, "scratch": writer.scratch, "store": store,
        "heldout": heldout, "run_dir": context.run_dir, "cache": cache,
    }  # fmt: skip
    cluster = context.cluster  # started before the relay: ray.init takes SIGTERM for itself
    if not all((folder / MANIFEST).is_file() for folder in (store, heldout) if folder):
        cluster.run_tasks("distill", prepare_rows, [payload], "sources tokenised")
    if cache is not None:
        files = [(cache, index) for index in range(len(cache.shards))]
        cluster.run_tasks("distill", verify_file, files, "files of the teacher's cache read")
    with SignalRelay(context.run_dir, context.display.say):
        cluster.run_workers("distill", distill_on_worker, payload, writer.train_storage)
    curve = take_json(writer.folder / "curve.json")
    masks, pattern = masks_of(writer.folder / "model")
    gate = check_files(writer.folder / "model", masks, pattern)
    return {
        **curve, "gate": gate, "is_teacher_rotated": rotation is not None,
        "forecast": _early_forecast(curve["steps"], context.config),
    }  # fmt: skip


def _early_forecast(curve: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """What the first part of the run let expect; the report draws it beside what came."""
    from jobs.training.schedule import FORECAST_SHARES, forecast_of, planned_rates

    rates = planned_rates(config.distill, len(curve))
    return forecast_of(curve[: round(FORECAST_SHARES[0] * len(curve))], rates).as_dict()


def _check_store(folder: Path, config: Config, teacher: Path) -> None:
    """Require rows that this run can read.

    Raises:
        InputError: rows of another length, or made with another tokenizer.
    """
    from sparsify.data.store import TokenStore
    from sparsify.errors import InputError
    from sparsify.models.load import load_tokenizer

    store = TokenStore.open(folder)
    if store.sequence_length != config.data.sequence_length:
        raise InputError(
            f"data.train={folder}: rows of {store.sequence_length} tokens, data.sequence_length is "
            f"{config.data.sequence_length}; set data.sequence_length={store.sequence_length}, or "
            "tokenise the text again"
        )
    store.check_tokenizer(load_tokenizer(teacher), str(teacher))


def prepare_rows(context: WorkerContext, payload: dict[str, Any]) -> None:
    """One task: training and held-out text as token stores in the stage's scratch folder."""
    import torch

    from jobs.corpus.rows import load_rows
    from jobs.runs.folder import disk_errors
    from jobs.training.heldout import write_heldout
    from jobs.training.schedule import num_steps
    from sparsify.data.shards import MANIFEST
    from sparsify.data.store_write import write_rows
    from sparsify.models.load import load_tokenizer

    torch.set_num_threads(context.num_threads)
    config, folder = payload["config"], payload["store"]
    wanted = num_steps(config) * config.distill.batch_size
    tokenizer = load_tokenizer(payload["teacher"])
    if payload.get("heldout") is not None:
        with disk_errors(folder):
            write_heldout(config, tokenizer, payload["heldout"])
    if (folder / MANIFEST).is_file():
        return
    rows, warning = load_rows(config.data, "train", tokenizer, wanted, config.run.seed)
    if warning:
        context.warn(warning)
    with disk_errors(folder):
        write_rows(folder, {"train": rows}, tokenizer, config.data.sequence_length)


def check(context: StageContext) -> None:
    """Require that the teacher's samples, where they are used, fit this run."""
    from jobs.training.teacher_samples import check_cache

    check_cache(context.config, context.models.dense)


STAGE = Stage("distill", "the recovered model", identity, run, check=check)
