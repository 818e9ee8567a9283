"""On every worker: build the pair of models, resume, train, write the recovered model.

The rows of step t are a function of (seed, t) alone. Every few steps the whole state goes to a
checkpoint; an interrupted recovery carries on from the last one, and on CPU ends in the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.runtime.backend import WorkerContext
    from conf.schema import Config
    from jobs.training.loop import Recovery
    from jobs.training.pace import Pace
    from jobs.training.teacher import TeacherModel
    from sparsify.data.teacher_samples import TeacherSamples


def distill_on_worker(context: WorkerContext, payload: dict[str, Any]) -> None:
    """On every worker: build the pair, resume if there is a checkpoint, train, write."""
    import torch

    from jobs.training.ledger import START
    from jobs.training.pace import Pace

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
    from jobs.training.build import build_recovery
    from jobs.training.engine import Partitioner
    from jobs.training.heldout import Heldout
    from jobs.training.student import load_student
    from jobs.training.teacher import load_teacher
    from jobs.training.teacher_samples import check_words
    from sparsify.data.store import TokenStore

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


def _write(
    payload: dict[str, Any], recovery: Recovery, pattern: str, teacher_kl: float | None
) -> None:
    """Rank 0 writes the recovered model and the loss curve."""
    from jobs.runs.folder import disk_errors, write_json
    from jobs.training import engine as _engine
    from sparsify.formats.basis import carry_rotation
    from sparsify.formats.sparse_folder import (
        MASKS,
        model_fingerprint,
        read_sparsity,
        write_sparsity,
    )
    from sparsify.masks.storage import save_masks
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
