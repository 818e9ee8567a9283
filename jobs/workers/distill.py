"""On every worker: build the pair of models, resume, train, write the recovered model.

The rows of step t are a function of (seed, t) alone. Every few steps the whole state goes to a
checkpoint; an interrupted recovery continues from the last one, and on CPU ends in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cluster.executor import Executor
from cluster.runtime.worker import WorkerContext
from conf.options.tokenize import TokenizeJobConfig
from conf.schema import Config
from jobs.corpus.rows import load_rows
from jobs.runs.artifact import StageWriter
from jobs.runs.display import Display
from jobs.runs.folder import disk_errors
from jobs.training.build import build_recovery, figures_of
from jobs.training.engine import Partitioner, gathered_state_dict
from jobs.training.heldout import Heldout, write_heldout
from jobs.training.inputs import check_words, checked_store, open_cache
from jobs.training.ledger import START
from jobs.training.loop import Recovery
from jobs.training.pace import Pace, early_forecast
from jobs.training.schedule import num_steps
from jobs.training.student import layers_of_teacher, load_student
from jobs.training.teacher import TeacherModel, load_teacher
from jobs.workers.tokenize import write_store
from sparsify.data.shards import MANIFEST
from sparsify.data.store import TokenStore
from sparsify.data.store_write import write_rows
from sparsify.data.teacher_samples import TeacherSamples
from sparsify.errors import InputError
from sparsify.formats.basis import carry_rotation, teacher_rotation
from sparsify.formats.sparse_folder import MASKS, model_fingerprint, read_sparsity, write_sparsity
from sparsify.formats.verify import check_files, masks_of
from sparsify.masks.storage import save_masks
from sparsify.models.load import load_tokenizer
from sparsify.models.save import save_model

_STORE, _HELDOUT = "rows", "heldout"

_TOKENS_AT_ONCE = 100_000_000
"""of training text that one task makes rows of; it holds some 30 bytes for each"""


def make_payload(
    config: Config, student: Path, teacher: Path, writer: StageWriter, run_dir: Path
) -> dict[str, Any]:
    """On the driver: what the tasks and workers of the stage are told, its inputs checked.

    Raises:
        InputError: the token store does not fit the run, or no rotation that is known brings the
            teacher into the student's basis.
    """
    settings = config.distill
    if layers_of_teacher(student, teacher) is not None and settings.moving_start == "dense":
        raise InputError(
            f"distill.moving_start=dense: {student} has fewer layers than the dense model; use "
            "distill.moving_start=given"
        )
    weight = settings.losses().peak("square_head")
    rotation = teacher_rotation(student, teacher, weight, settings.moving_start)
    return {
        "config": config, "student": student, "teacher": teacher, "rotation": rotation,
        "folder": writer.folder, "scratch": writer.scratch, "run_dir": run_dir,
        "store": checked_store(config, teacher) or writer.scratch / _STORE,
        "heldout": None if settings.heldout_every_steps is None else writer.scratch / _HELDOUT,
        "cache": open_cache(config),
    }  # fmt: skip


def has_rows(payload: dict[str, Any]) -> bool:
    """Whether the stores that `prepare_rows` makes are there already."""
    stores = (payload["store"], payload.get("heldout"))
    return all((folder / MANIFEST).is_file() for folder in stores if folder is not None)


def prepare_rows(context: WorkerContext, payload: dict[str, Any]) -> None:
    """One task: training and held-out text as token stores in the stage's scratch folder; training
    text for more than `_TOKENS_AT_ONCE` is left to `tokenize_in_shards`."""
    torch.set_num_threads(context.num_threads)
    config, folder = payload["config"], payload["store"]
    wanted = num_steps(config) * config.distill.batch_size
    tokenizer = load_tokenizer(payload["teacher"])
    if payload.get("heldout") is not None:
        with disk_errors(folder):
            warnings = write_heldout(config, tokenizer, payload["heldout"])
        for line in warnings:
            context.warn(line)
    if (folder / MANIFEST).is_file() or wanted * config.data.sequence_length > _TOKENS_AT_ONCE:
        return
    rows, warning = load_rows(config.data, "train", tokenizer, wanted, config.run.seed)
    if warning:
        context.warn(warning)
    with disk_errors(folder):
        write_rows(folder, {"train": rows}, tokenizer, config.data.sequence_length)


def tokenize_in_shards(
    stage: str, payload: dict[str, Any], cluster: Executor, display: Display
) -> None:
    """On the driver: the training rows that `prepare_rows` has left, as `jobs.tokenize` makes them.

    All of the text is tokenised, by all workers, a piece at a time; a stage that was killed
    continues at the pieces that are missing.

    Args:
        stage: its name.
        payload: of the stage.
        cluster, display: of the run.

    Raises:
        InputError: see `workers.tokenize.write_store`.
    """
    config, folder = payload["config"], payload["store"]
    if (folder / MANIFEST).is_file():
        return
    tokenizer = payload["teacher"] or payload["student"]  # one that starts anew has no teacher
    job = TokenizeJobConfig(replace(config.model, path=str(tokenizer)), config.data)

    def map_shards(work: Callable[..., Any], tasks: list[Any]) -> None:
        cluster.run_tasks(stage, work, tasks, "pieces of text tokenised")

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_store(job, folder, map_shards, display)


def verify_file(context: WorkerContext, payload: tuple[TeacherSamples, int]) -> None:
    """One task: hash a file of a cache.

    Raises:
        InputError: it differs from what was written.
    """
    cache, index = payload
    cache.verify_shard(cache.shards[index])


def distill_on_worker(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any] | None:
    """On every worker: build the pair, resume if there is a checkpoint, train, write.

    Returns:
        On rank 0 the figures of the run, else None.
    """
    torch.set_num_threads(context.num_threads)
    config: Config = payload["config"]
    torch.manual_seed(config.run.seed)
    pace = Pace(context, config.distill, payload["scratch"], config.data.sequence_length)
    with pace.interval(START):
        recovery, pattern, teacher_kl = prepare(context, payload, pace)
        recovery.resume()
    recovery.train()
    state = gathered_state_dict(recovery.engine)
    if state is None:
        return None
    num_tokens = recovery.curve[-1]["num_tokens"]
    _write(payload, recovery, state, pattern, num_tokens)
    return {
        **figures_of(recovery),
        "teacher_float8_kl": teacher_kl,
        "mask_share_moved": recovery.mask_share_moved,
        "forecast": early_forecast(config.distill, recovery.curve),
    }


def prepare(
    context: WorkerContext, payload: dict[str, Any], pace: Pace
) -> tuple[Recovery, str, float | None]:
    """Student in its engine, teacher in its place, rows: a recovery that has yet to start.

    Returns:
        It, the pattern of its masks, and the KL divergence that an 8-bit teacher costs.
    """
    config: Config = payload["config"]
    settings, store = config.distill, TokenStore.open(payload["store"])
    split = Partitioner(settings, context.world_size, context.device == "cuda")
    student = load_student(
        payload["student"], payload["teacher"], payload["rotation"], config, context, split
    )
    cache: TeacherSamples | None = payload.get("cache")
    teacher_kl: float | None = None
    teacher: TeacherModel | TeacherSamples
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


def check_result(folder: Path) -> dict[str, int]:
    """On the driver: whether every pruned weight of what was written is zero; its counts."""
    return check_files(folder, *masks_of(folder))


def _write(
    payload: dict[str, Any], recovery: Recovery, state: dict[str, torch.Tensor], pattern: str,
    num_tokens: int,
) -> None:  # fmt: skip
    """Rank 0 writes the recovered model."""
    folder = payload["folder"] / "model"
    before = read_sparsity(payload["student"]) or {}
    provenance = {
        **before.get("provenance", {}),
        "dense_path": str(payload["teacher"].resolve()),
        "dense_sha256": model_fingerprint(payload["teacher"]),
        "num_recovery_tokens": num_tokens,
    }
    with disk_errors(folder):
        tokenizer = load_tokenizer(payload["student"])
        save_model(recovery.engine.module.model, tokenizer, folder, state)
        save_masks(folder / MASKS, recovery.masks)
        carry_rotation(payload["student"], folder)
        write_sparsity(folder, recovery.masks, pattern, before.get("method", "given"), provenance)
