"""Recover a pruned model by distillation: the dense model teaches, DeepSpeed ZeRO trains.

The rows of step t are a function of (seed, t) alone. Every few steps the whole state goes to a
checkpoint; an interrupted recovery carries on from the last one, and on CPU ends in the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from conf.schema import Config
    from jobs._artifact import StageWriter
    from jobs._pace import Pace
    from jobs._recovery import Recovery
    from jobs._stage import StageContext
    from jobs._teacher import TeacherModel
    from sparsify.sample_store import SampleCache

_STORE, _HELDOUT = "rows", "heldout"


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the recovered weights."""
    from jobs._sources import source_fingerprint
    from jobs._stage import fingerprints, given_masks, heldout_inputs
    from jobs._teacher_cache import open_cache
    from sparsify.store import TokenStore

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


def given_store(config: Config) -> Path | None:
    """The token store that data.train is, if it is one."""
    from sparsify.store import is_store

    train = config.data.train
    return Path(train) if train is not None and is_store(train) else None


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Tokenise once, train on all workers, check the zeros of what was written."""
    from cluster.preempt import SignalRelay
    from jobs._artifact import take_json
    from jobs._gate import check_files, masks_of
    from jobs._rotation import teacher_rotation
    from jobs._teacher_cache import open_cache, verify_file
    from sparsify.store import MANIFEST

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
    from jobs._schedule import FORECAST_SHARES, forecast_of, planned_rates

    rates = planned_rates(config.distill, len(curve))
    return forecast_of(curve[: round(FORECAST_SHARES[0] * len(curve))], rates).as_dict()


def _check_store(folder: Path, config: Config, teacher: Path) -> None:
    """Require rows that this run can read.

    Raises:
        InputError: rows of another length, or made with another tokenizer.
    """
    from sparsify.errors import InputError
    from sparsify.models.load import load_tokenizer
    from sparsify.store import TokenStore

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

    from jobs._artifact import disk_errors
    from jobs._heldout import write_heldout
    from jobs._schedule import num_steps
    from jobs._sources import load_rows
    from sparsify.models.load import load_tokenizer
    from sparsify.store import MANIFEST
    from sparsify.store_write import write_rows

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


def distill_on_worker(context: WorkerContext, payload: dict[str, Any]) -> None:
    """On every worker: build the pair, resume if there is a checkpoint, train, write."""
    import torch

    from jobs._ledger import START
    from jobs._pace import Pace

    torch.set_num_threads(context.num_threads)
    config: Config = payload["config"]
    torch.manual_seed(config.run.seed)
    pace = Pace(context, config.distill, payload["scratch"], config.data.sequence_length)
    with pace.interval(START):
        recovery, pattern, teacher_kl = _prepare(context, payload, pace)
        recovery.resume()
    recovery.train()
    _write(payload, recovery, pattern, teacher_kl)


def _prepare(
    context: WorkerContext, payload: dict[str, Any], pace: Pace
) -> tuple[Recovery, str, float | None]:
    """Student in its engine, teacher in its place, rows: a recovery that has yet to begin."""
    from jobs._assembly import build_recovery
    from jobs._engine import Partitioner
    from jobs._heldout import Heldout
    from jobs._start import load_student
    from jobs._teacher import load_teacher
    from jobs._teacher_cache import check_words
    from sparsify.store import TokenStore

    config: Config = payload["config"]
    settings, store = config.distill, TokenStore.open(payload["store"])
    split = Partitioner(settings, context.world_size, context.device == "cuda")
    student = load_student(
        payload["student"], payload["teacher"], payload["rotation"], config, context, split
    )
    cache: SampleCache | None = payload.get("cache")
    teacher_kl: float | None = None
    teacher: TeacherModel | SampleCache
    if cache is not None:
        check_words(cache, student.model)
        teacher = cache
    else:
        teacher = load_teacher(
            payload["teacher"], settings, payload["rotation"], context, store.rows([0]),
            config.data.isolate_documents,
        )  # fmt: skip
        teacher_kl = teacher.float8_kl
    heldout = payload.get("heldout") and Heldout(
        TokenStore.open(payload["heldout"]), context.rank, context.world_size,
        settings.micro_batch_size, context.device, cache is None,
    )  # fmt: skip
    recovery = build_recovery(
        context, config, student, teacher, store, heldout, pace, payload["scratch"],
        payload["run_dir"],
    )  # fmt: skip
    return recovery, str(student.pattern), teacher_kl


def _write(
    payload: dict[str, Any], recovery: Recovery, pattern: str, teacher_kl: float | None
) -> None:
    """Rank 0 writes the recovered model and the loss curve."""
    from jobs import _engine
    from jobs._artifact import disk_errors, model_fingerprint, write_json
    from jobs._rotation import carry_rotation
    from jobs._stage import MASKS, read_sparsity, write_sparsity
    from sparsify.masks import save_masks
    from sparsify.models.load import load_tokenizer

    state = _engine.gathered_state_dict(recovery.engine)
    if state is None:
        return
    folder = payload["folder"] / "model"
    before = read_sparsity(payload["student"]) or {}
    num_tokens = recovery.curve[-1]["num_tokens"]
    provenance = {
        **before.get("provenance", {}),
        "dense_path": str(payload["teacher"].resolve()),
        "dense_sha256": model_fingerprint(payload["teacher"]),
        "num_recovery_tokens": num_tokens,
    }
    with disk_errors(folder):
        recovery.engine.module.model.save_pretrained(folder, state_dict=state)
        load_tokenizer(payload["student"]).save_pretrained(folder)
        save_masks(folder / MASKS, recovery.masks)
        carry_rotation(payload["student"], folder)
        write_sparsity(folder, recovery.masks, pattern, before.get("method", "given"), provenance)
    write_json(
        payload["folder"] / "curve.json",
        {
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / recovery.pace.trained_s,
            "goodput": recovery.pace.summary(),
            "teacher_float8_kl": teacher_kl,
            "mask_share_moved": recovery.mask_share_moved,
            "steps": recovery.curve,
            "heldout": recovery.heldout_curve,
        },
    )


if __name__ == "__main__":
    from jobs._entry import main

    main("distill")
