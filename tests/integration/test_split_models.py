"""Models that are split over the workers as they are read: the same bits, and never whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integration.recoveries import LENGTH, make_recovery, run, state_hash


def compare_with_whole(rank: int, base: Path, out: Path, precision: str) -> None:
    """ZeRO-3 of a student that was read block by block, and of one that was loaded first."""
    from jobs.training.engine import Partitioner

    settings = {"zero_stage": 3, "precision": precision, "num_tokens": 2 * 8 * LENGTH}
    found = []
    for name, is_needed in (("split", True), ("whole", False)):
        before = Partitioner.__init__

        def made(self: Any, *args: Any, before: Any = before, needed: bool = is_needed) -> None:
            before(self, *args)
            self.is_needed = needed

        Partitioner.__init__ = made  # type: ignore[method-assign]
        recovery, _ = make_recovery(base, out / name, **settings)
        Partitioner.__init__ = before  # type: ignore[method-assign]
        begun = state_hash(recovery)
        recovery.train()
        found.append((begun, recovery.curve, state_hash(recovery)))
    (begun, curve, ended), (other_begun, other_curve, _) = found
    assert begun == other_begun != ended
    assert curve[0]["loss"] == other_curve[0]["loss"]
    # DeepSpeed adds the squares for the norm up in the order in which it met the parameters.
    norms = [each[0]["grad_norm"] for each in (curve, other_curve)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    assert curve[1]["loss"] == pytest.approx(other_curve[1]["loss"], rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_read_block_by_block_is_the_one_loaded_whole(base, tmp_path, precision) -> None:
    run(2, compare_with_whole, base, tmp_path, precision)


def hold_at_most_a_block(rank: int, base: Path, out: Path) -> None:
    """Count what a worker holds of both models while they are read."""
    from conf.options.data import DataConfig
    from conf.options.distill import DistillConfig
    from conf.schema import Config
    from jobs.training import engine as _engine
    from jobs.training import student as _models
    from jobs.training import student as _start
    from jobs.training import teacher as _teacher
    from sparsify.data.rows import TokenRows
    from sparsify.models.blocks import BlocksOnDisk

    context: Any = SimpleNamespace(
        device="cpu", world_size=2, local_world_size=2, rank=rank, warn=pytest.fail
    )
    settings = DistillConfig(zero_stage=3, teacher_placement="sharded")
    config = Config(distill=settings, data=DataConfig(sequence_length=LENGTH))
    most: dict[str, int] = {}

    class Watched(BlocksOnDisk):
        """Notes the largest number of block weights that were there at one time."""

        def open(self, index: int) -> Any:
            block = super().open(index)
            held = 0
            for param in self.blocks.parameters():
                local = param.to_local() if hasattr(param, "to_local") else param.data
                held += 0 if local.is_meta else local.numel()
            own = sum(param.numel() for param in block.parameters())
            name = "teacher" if self in teachers else "student"
            most[name] = max(most.get(name, 0), held / own)
            return block

    teachers: list[Any] = []
    _models.BlocksOnDisk = Watched
    split = _engine.Partitioner(settings, 2, False)
    student = _start.load_student(base / "student", base / "teacher", None, config, context, split)
    assert all(hasattr(p, "ds_tensor") for p in student.model.model.layers.parameters())

    made = _models.open_blocks

    def open_blocks(*args: Any) -> Any:
        teachers.append(made(*args))
        return teachers[-1]

    _teacher.open_blocks = open_blocks
    rows = TokenRows.whole(torch.arange(3, 3 + LENGTH)[None])
    _teacher.load_teacher(base / "teacher", settings, None, context, rows, True)
    dist.barrier()
    num_blocks = len(student.model.model.layers)
    assert num_blocks >= 2
    # ZeRO keeps a parameter's memory as its slice; FSDP2 leaves half of each earlier block.
    assert most["student"] <= 1.01
    assert most["teacher"] <= 1 + (num_blocks - 1) / 2 + 0.01


def test_no_worker_holds_a_whole_model(base, tmp_path) -> None:
    run(2, hold_at_most_a_block, base, tmp_path)
