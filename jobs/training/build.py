"""A recovery put together from its parts: both models, their engine, the rows, the clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from cluster.runtime.worker import WorkerContext
from conf.options.distill import DistillConfig
from conf.schema import Config
from jobs.training.batches import Batches
from jobs.training.engine import build_engine
from jobs.training.heldout import Heldout
from jobs.training.loop import Recovery, Setup
from jobs.training.mask_guard import MaskGuard
from jobs.training.pace import Pace
from jobs.training.student import Student
from jobs.training.teacher import TeacherModel
from jobs.training.zero import masks_at_step
from sparsify.costs.flops import ModelFlops
from sparsify.data.store import TokenStore
from sparsify.data.teacher_samples import TeacherSamples
from sparsify.distillation.student import DistillStudent

EngineMaker = Callable[[nn.Module, DistillConfig, int, bool], Any]


def build_recovery(
    context: WorkerContext, config: Config, student: Student,
    teacher: TeacherModel | TeacherSamples | None,
    store: TokenStore, heldout: Heldout | None, pace: Pace, scratch: Path, run_dir: Path,
    make_engine: EngineMaker = build_engine,
) -> Recovery:  # fmt: skip
    """A recovery that has yet to start.

    Args:
        context: this worker.
        config: of the run.
        student: from `jobs.training.student.load_student`.
        teacher: from `load_teacher`, or the samples that stand for it; None: cross-entropy alone.
        store: the training rows.
        heldout: scores on the way; None for none.
        pace: the clock.
        scratch: folder of the checkpoints, shared by all workers.
        run_dir: folder of the run, where switches are looked for.
        make_engine: `build_engine`, or what takes its place.
    """
    flops: tuple[ModelFlops, ModelFlops | None] | None = None
    cache, head = None, None
    if teacher is None or isinstance(teacher, TeacherSamples):
        cache = teacher
        if student.flops is not None:
            flops = student.flops, None
    else:
        head = teacher.head
        if student.flops is not None and teacher.flops is not None:
            flops = student.flops, teacher.flops
    batches = Batches(
        store, config.distill, config.run.seed, context.rank, context.world_size,
        config.data.isolate_documents, flops, cache,
    )  # fmt: skip
    wrapped = DistillStudent(student.model, found=student.head, kept_layers=student.kept_layers)
    engine = make_engine(wrapped, config.distill, context.world_size, context.device == "cuda")
    guard = MaskGuard(engine, student.masks, masks_at_step(config.distill))
    if student.moving is None:
        guard.clear()
    return Recovery(
        Setup(
            context, config, engine, guard, head, student.moving, student.masks, batches, heldout,
            pace, scratch, run_dir,
        )
    )  # fmt: skip


def figures_of(recovery: Recovery) -> dict[str, Any]:
    """What the record of every training says of it, once it is through; of rank 0."""
    num_tokens = recovery.curve[-1]["num_tokens"]
    return {
        "num_tokens": num_tokens,
        "tokens_per_s": num_tokens / recovery.pace.trained_s,
        "goodput": recovery.pace.summary(),
        "is_cut": recovery.is_cut,
        "steps": recovery.curve,
        "heldout": recovery.heldout_curve,
    }
