"""A recovery put together from its parts: both models, their engine, the rows, the clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from jobs import _engine
from jobs._batches import Batches
from jobs._recovery import Recovery
from sparsify.flops import ModelFlops
from sparsify.models.head import DistillStudent
from sparsify.sample_store import SampleCache
from sparsify.store import TokenStore

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from conf.schema import Config
    from conf.stages import DistillConfig
    from jobs._heldout import Heldout
    from jobs._models import Student
    from jobs._pace import Pace
    from jobs._teacher import TeacherModel

EngineMaker = Callable[[nn.Module, "DistillConfig", int, bool], Any]


def build_recovery(
    context: WorkerContext, config: Config, student: Student, teacher: TeacherModel | SampleCache,
    store: TokenStore, heldout: Heldout | None, pace: Pace, scratch: Path, run_dir: Path,
    make_engine: EngineMaker = _engine.build_engine,
) -> Recovery:  # fmt: skip
    """A recovery that has yet to begin.

    Args:
        context: this worker.
        config: of the run.
        student: from `jobs._start.load_student`.
        teacher: from `load_teacher`, or the samples that stand for it.
        store: the training rows.
        heldout: scores on the way; None for none.
        pace: the clock.
        scratch: folder of the checkpoints, shared by all workers.
        run_dir: folder of the run, where switches are looked for.
        make_engine: `_engine.build_engine`, or what takes its place.
    """
    flops: tuple[ModelFlops, ModelFlops | None] | None = None
    cache, head = None, None
    if isinstance(teacher, SampleCache):
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
    wrapped = DistillStudent(student.model, found=student.head)
    engine = make_engine(wrapped, config.distill, context.world_size, context.device == "cuda")
    guard = _engine.MaskGuard(engine, student.masks)
    if student.moving is None:
        guard.clear()
    return Recovery(
        context, config, engine, guard, head, student.moving, student.masks, batches,
        heldout, pace, scratch, run_dir,
    )  # fmt: skip
