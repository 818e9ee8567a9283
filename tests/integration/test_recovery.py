"""The recovery on two gloo processes, disturbed in every way that issues have named.

Killed, stopped, fed with NaN, on other numbers of workers, with damaged checkpoints, on a full
disk: what comes of it is the result of an undisturbed run, or one line that says what to do.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.preempt import DrainWatch
from cluster.watchdog import EXIT_HANG
from jobs.training import checkpoint as _checkpoint
from jobs.training import engine as _engine
from jobs.training import zero_state
from jobs.training.checkpoint import finished_steps, name_of
from sparsify.errors import NonFiniteError, ReplicasDifferError, StoppedEarlyError, TwofourError
from sparsify.formats.verify import check_weight
from sparsify.models.masked import num_alive
from sparsify.pattern import Pattern
from tests.integration.recoveries import (
    BATCH,
    NUM_STEPS,
    Worker,
    at_step,
    exit_codes,
    log_rows,
    make_recovery,
    results,
    run,
    state_hash,
)

STAGES = (0, 2, 3)


# killed and resumed -----------------------------------------------------------------------------


def train_all(rank: int, base: Path, out: Path, name: str, **settings: Any) -> None:
    """Train to the end in every ZeRO stage, each in a folder of its own."""
    for stage in STAGES:
        folder = out / f"zero-{stage}"
        recovery, worker = make_recovery(base, folder, zero_stage=stage, **settings)
        rows = log_rows(recovery)
        recovery.train()
        found = {**results(recovery), "rows": rows, "said": worker.said}
        torch.save(found, folder / f"{name}-{rank}")


def train_until_killed(rank: int, base: Path, out: Path, stage: int, step: int) -> None:
    recovery, _ = make_recovery(base, out / f"zero-{stage}", zero_stage=stage)
    rows = log_rows(recovery)

    def die() -> None:
        recovery._checkpoints.wait()
        torch.distributed.barrier()
        torch.save(rows, out / f"zero-{stage}" / f"killed-{rank}")
        os.kill(os.getpid(), signal.SIGKILL)

    at_step(recovery, step, die)
    recovery.train()


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run(2, train_all, base, out, "found")
    return out


@pytest.fixture(scope="module")
def resumed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resumed")
    for stage in STAGES:
        codes = exit_codes(2, train_until_killed, base, out, stage, 7)
        assert codes == [-signal.SIGKILL] * 2
    run(2, train_all, base, out, "found")
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_undisturbed_to_the_bit(undisturbed, resumed, stage) -> None:
    for rank in (0, 1):
        one, other = (
            torch.load(out / f"zero-{stage}" / f"found-{rank}") for out in (undisturbed, resumed)
        )
        assert len(one["curve"]) == NUM_STEPS
        assert other["curve"] == one["curve"]
        assert other["state"] == one["state"]
        assert other["model"] == one["model"]
    assert one["curve"][-1]["loss"] < one["curve"][0]["loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_rows_are_the_orders_prefix_none_lost_none_twice(base, resumed, stage) -> None:
    from sparsify.data.order import TrainingOrder
    from sparsify.data.store import TokenStore

    store = TokenStore.open(base / "rows")
    ids = {tuple(row.tolist()): n for n, row in enumerate(store.rows(range(len(store))).ids_NT)}
    assert len(ids) == len(store), "rows can be told apart"
    order = TrainingOrder([len(store)], seed=0)
    trained: list[set[int]] = [set() for _ in range(NUM_STEPS)]
    num = 0
    for rank in (0, 1):
        folder = resumed / f"zero-{stage}"
        first = [one for one in torch.load(folder / f"killed-{rank}") if one[0] < 4]
        second = torch.load(folder / f"found-{rank}")["rows"]
        assert min(step for step, _ in second) == 4, "goes on behind the checkpoint"
        for step, row in [*first, *second]:
            trained[step].add(ids[tuple(row.tolist())])
            num += 1
    assert num == NUM_STEPS * BATCH
    assert trained == [set(order.batch(step, BATCH).tolist()) for step in range(NUM_STEPS)]
    crcs = [one["row_crc"] for one in torch.load(resumed / f"zero-{stage}/found-0")["curve"]]
    expected = [order.batch(step, BATCH).numpy().tobytes() for step in range(NUM_STEPS)]
    assert crcs == [zlib.crc32(rows) for rows in expected]


# asked to stop, on another number of workers ----------------------------------------------------


def train_until_asked(rank: int, base: Path, out: Path, stage: int, step: int | None) -> None:
    """Train until `touch RUN/stop` before a step; None: to the end."""
    recovery, worker = make_recovery(base, out, zero_stage=stage, checkpoint_every_steps=100)
    if step is not None:
        if rank == 0:
            at_step(recovery, step - 2, (out / "save").touch)
            at_step(recovery, step - 1, (out / "stop").touch)
            recovery._requests._poll_s = 0.0
        with pytest.raises(StoppedEarlyError, match=f"stopped after step {step} of 12"):
            recovery.train()
        if rank == 0:
            assert not any((out / switch).exists() for switch in ("save", "stop"))
        assert finished_steps(out / "scratch")[-2:] == [step - 1, step]
    else:
        recovery.train()
        torch.save({**results(recovery), "said": worker.said}, out / f"found-{rank}")


def test_two_then_one_then_two_workers_train_on_the_same_rows(base, undisturbed, tmp_path) -> None:
    run(2, train_until_asked, base, tmp_path, 2, 4)
    run(1, train_until_asked, base, tmp_path, 3, 8)
    run(2, train_until_asked, base, tmp_path, 2, None)
    found = torch.load(tmp_path / "found-0")
    straight = torch.load(undisturbed / "zero-2/found-0")
    assert any("continues after step 8" in line for line in found["said"])
    for one, other in zip(found["curve"], straight["curve"], strict=True):
        assert one["row_crc"] == other["row_crc"]
        # Measured 3.4e-7 at most: sums over rows are split in another way.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


# bad steps --------------------------------------------------------------------------------------


def poison(recovery: Any, rank: int, steps: set[int]) -> None:
    """NaN in four elements, two of them kept, of a weight's gradient on a worker, in some steps."""
    weight = dict(recovery.engine.module.named_parameters())["model.layers.0.mlp.up_proj.weight"]

    def hook(grad: torch.Tensor) -> torch.Tensor | None:
        if rank != 1 or len(recovery.curve) not in steps:
            return None
        grad = grad.clone()
        grad.view(-1)[:4] = float("nan")
        return grad

    weight.register_hook(hook)


def nan_loss(recovery: Any, rank: int, step: int) -> None:
    """A loss that is NaN, with its gradients, on one worker in one step."""
    before = recovery.engine.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        loss, metrics = before(*args, **kwargs)
        bad = rank == 1 and len(recovery.curve) == step
        return loss * (float("nan") if bad else 1.0), metrics

    recovery.engine.module.forward = forward


def compare_states(recovery: Any) -> list[bool]:
    """Whether the state was the same to the bit before and after each step's update."""
    same: list[bool] = []
    before = recovery._update

    def update(*args: Any) -> str:
        was = state_hash(recovery)
        verdict = before(*args)
        same.append(state_hash(recovery) == was)
        return str(verdict)

    recovery._update = update
    return same


def clear_after(recovery: Any, method: str, bad: set[int]) -> None:
    """Forget `bad` when the method has been called."""
    before = getattr(recovery, method)
    setattr(recovery, method, lambda: (before(), bad.clear()))


def train_with_bad_steps(rank: int, base: Path, out: Path) -> None:
    for stage in STAGES:
        folder = out / f"zero-{stage}"

        def make(name: str, folder: Path = folder, stage: int = stage, **settings: Any) -> Any:
            return make_recovery(base, folder / name, zero_stage=stage, **settings)

        one, _ = make("skip", on_bad_step="skip", max_bad_steps=3)
        poison(one, rank, {5, 6})
        nan_loss(one, rank, 2)
        same = compare_states(one)
        one.train()
        assert [step for step, is_same in enumerate(same) if is_same] == [2, 5, 6]
        assert zero_state.num_updates(one.engine) == NUM_STEPS - 3
        skipped = results(one)

        # Bad once, and not when it comes again: that it is left out is the policy's doing.
        two, worker = make("back", on_bad_step="rollback", max_bad_steps=1)
        bad = {2, 5, 6}
        poison(two, rank, bad)
        clear_after(two, "_roll_back", bad)
        two.train()
        assert zero_state.num_updates(two.engine) == NUM_STEPS - 3
        torch.save((skipped, results(two), worker.said), folder / f"found-{rank}")

        three, worker = make("beyond", on_bad_step="rollback", max_bad_steps=0)
        poison(three, rank, set(range(5, 99)))
        with pytest.raises(
            NonFiniteError, match=r"after 2 rollbacks; lower distill\.learning_rate"
        ):
            three.train()
        assert sum("back to step 4" in line for line in worker.said) == 2 * (rank == 0)

    four, _ = make("first", on_bad_step="rollback", max_bad_steps=0)
    poison(four, rank, {2})
    with pytest.raises(NonFiniteError, match="before the first checkpoint"):
        four.train()
    five, _ = make("stop", on_bad_step="stop")
    poison(five, rank, {6})
    with pytest.raises(NonFiniteError, match=r"step 6: gradient norm is nan; lower"):
        five.train()
    assert len(five.curve) == 6


@pytest.fixture(scope="module")
def bad_steps(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bad_steps")
    run(2, train_with_bad_steps, base, out)
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_is_left_out_or_rolled_back_and_the_run_goes_on(bad_steps, stage) -> None:
    for rank in (0, 1):
        skipped, rolled_back, said = torch.load(bad_steps / f"zero-{stage}/found-{rank}")
        curve = skipped["curve"]
        assert [one["step"] - 1 for one in curve if one["is_skipped"]] == [2, 5, 6]
        assert [one["step"] - 1 for one in curve if one["grad_norm"] is None] == [2, 5, 6]
        assert [one["step"] - 1 for one in curve if one["loss"] is None] == [2]
        # Rolled back to step 4 at the second bad step in a row: the weights are those of a run
        # that left the same steps out.
        assert rolled_back["state"] == skipped["state"]
        assert rolled_back["model"] == skipped["model"]
        if rank == 0:
            assert sum("back to step 4" in line for line in said) == 1
            assert sum("was bad before the rollback" in line for line in said) == 2


# stopped, out of step, on a full disk -----------------------------------------------------------


def train_with_one_stopped(rank: int, base: Path, out: Path) -> None:
    recovery, _ = make_recovery(base, out, hang_after_s=3.0)
    if rank == 1:
        at_step(recovery, 6, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    recovery.train()


def test_a_stopped_worker_ends_the_others_with_word_of_where_they_waited(base, tmp_path) -> None:
    codes = exit_codes(2, train_with_one_stopped, base, tmp_path)
    assert codes == [EXIT_HANG, None], "the stopped one is there until someone kills it"
    stacks = (tmp_path / "scratch/stacks-rank-00000.txt").read_text(encoding="utf-8")
    assert "the limit is 3.0 s" in stacks
    assert "jobs/training/loop.py" in stacks
    assert finished_steps(tmp_path / "scratch") == [4]


def train_with_a_dead_disk(rank: int, base: Path, out: Path) -> None:
    """The second save waits for the write of the first, which never ends."""
    recovery, _ = make_recovery(base, out, pause_limit_s=1.0, checkpoint_every_steps=2)
    _checkpoint.write_fragments = lambda *_: threading.Event().wait()
    recovery.train()


def test_a_save_that_hangs_ends_its_worker_with_word_of_where_it_waited(base, tmp_path) -> None:
    codes = exit_codes(2, train_with_a_dead_disk, base, tmp_path)
    assert codes == [EXIT_HANG] * 2
    stacks = (tmp_path / "scratch/stacks-rank-00000.txt").read_text(encoding="utf-8")
    assert "the limit is 1.0 s" in stacks
    assert "in _save" in stacks
    assert finished_steps(tmp_path / "scratch") == []


def train_with_faults(rank: int, base: Path, out: Path) -> None:
    """What ends in one line or in a warning, in one process group."""
    for stage in (0, 2):
        one, _ = make_recovery(
            base, out / f"flip-{stage}", zero_stage=stage, checksum_every_steps=1
        )
        before = one._check_replicas

        def flip_and_check(step: int, one: Any = one, before: Any = before) -> None:
            if step == 3 and rank == 1:
                weight = next(one.engine.module.parameters()).data.view(-1)
                weight[5:6].view(torch.int32).bitwise_xor_(1)
            before(step)

        one._check_replicas = flip_and_check
        with pytest.raises(ReplicasDifferError, match=r"after step 3 the weights of workers \[1\]"):
            one.train()

    folder = out / "full"
    two, _ = make_recovery(base, folder)
    written = _checkpoint.write_fragments

    def full(path: Path, fragments: Any) -> None:
        path.with_name(f".{path.name}.tmp").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    at_step(two, 5, lambda: setattr(_checkpoint, "write_fragments", full))
    at_step(two, 8, lambda: two._checkpoints._thread.join())  # so that all raise after this step
    with pytest.raises(TwofourError, match="the disk is full; free some space and run the same"):
        two.train()
    _checkpoint.write_fragments = written
    dist.barrier()
    assert finished_steps(folder / "scratch") == [4]
    two, worker = make_recovery(base, folder)  # there is space again
    assert len(two.curve) == 4
    two.train()

    # Its newest checkpoint is damaged: the one before it is taken, and what follows is the same.
    folder_8 = folder / "scratch" / name_of(8)
    if rank == 0:
        shutil.rmtree(folder / "scratch" / name_of(12), ignore_errors=True)
        path = folder_8 / "rank-00001.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    dist.barrier()
    expected = results(two)
    three, worker = make_recovery(base, folder)
    assert len(three.curve) == 4
    if rank == 0:
        assert "step-00000008" in worker.said[0]
        assert "going back to the checkpoint before it" in worker.said[0]
    three.train()
    assert results(three) == expected

    # A node is drained: one checkpoint, however often it is asked.
    four, worker = make_recovery(base, out / "drained", checkpoint_every_steps=100)
    four._drains = DrainWatch(poll_s=0.0)
    at_step(four, 6, lambda: setattr(worker, "is_node_draining", True))
    four.train()
    assert finished_steps(out / "drained/scratch") == [7]
    assert len(four.curve) == NUM_STEPS

    # By Young's formula: the twentieth step, in the background; here every second one.
    five, _ = make_recovery(base, out / "young", checkpoint_every_steps=None, keep_checkpoints=9)
    five.pace.wants_checkpoint = lambda step: rank == 0 and step % 5 == 0
    waited = []
    wait = five._checkpoints.wait
    five._checkpoints.wait = lambda: (waited.append(len(five.curve)), wait())
    five.train()
    assert finished_steps(out / "young/scratch") == [5, 10]
    assert waited == [5, 10, 12], "once at each save, for the one before it, and at the end"


def test_faults_end_in_one_line_or_in_the_same_run(base, tmp_path) -> None:
    run(2, train_with_faults, base, tmp_path)


# masks that move --------------------------------------------------------------------------------


def moving(base: Path, out: Path, stage: int, share: float = 0.5) -> tuple[Any, Worker]:
    return make_recovery(
        base, out / f"zero-{stage}", zero_stage=stage, moving_share=share, mask_refresh_steps=2,
        mask_decay=0.3, learning_rate=1e-2, checkpoint_every_steps=3,
    )  # fmt: skip


def move_masks(rank: int, base: Path, out: Path) -> None:
    for stage in (2, 3):
        recovery, _ = moving(base, out, stage)
        recovery.train()
        recovery._guard.check()
        share = recovery.mask_share_moved
        assert 0 < share < 1
        state = _engine.gathered_state_dict(recovery.engine)
        if state is not None:
            for name, mask in recovery.masks.items():
                check_weight(name, state[f"{name}.weight"], mask, Pattern.parse("2:4"))
        found = {**results(recovery), "masks": dict(recovery.masks), "share": share}
        torch.save(found, out / f"zero-{stage}" / f"found-{rank}")


def move_until_killed(rank: int, base: Path, out: Path, stage: int) -> None:
    recovery, _ = moving(base, out, stage)

    def die() -> None:
        recovery._checkpoints.wait()
        torch.distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)

    at_step(recovery, 5, die)
    recovery.train()


def test_moving_masks_killed_on_the_way_end_in_the_same_bits(base, tmp_path) -> None:
    compare_killed_with_undisturbed(base, tmp_path)


def count_alive(rank: int, base: Path, out: Path) -> None:
    """Weights behind the masks, before each step: dense ones, until masks stay for the last."""
    recovery, worker = moving(base, out, 2, share=0.97)
    alive = []
    for step in range(NUM_STEPS):
        at_step(
            recovery,
            step,
            lambda: alive.append(num_alive(recovery.engine.module.model, recovery.masks)),
        )
    recovery.train()
    # Half of every group at first. Every weight moves, so that none is zero by chance.
    assert alive == [sum(mask.numel() for mask in recovery.masks.values()) // 2] * 11 + [0]
    assert any("50.0% of those of 14 layers are alive" in line for line in worker.said) == (
        rank == 0
    )
    recovery._guard.check()


def test_dense_weights_behind_moving_masks_end_in_the_pattern(base, tmp_path) -> None:
    """The student is the dense model, without masks; the same when killed before masks stay."""
    dense = tmp_path / "dense"
    dense.mkdir()
    for name, target in (("student", "teacher"), ("teacher", "teacher"), ("rows", "rows")):
        (dense / name).symlink_to(base / target)
    compare_killed_with_undisturbed(dense, tmp_path)
    run(2, count_alive, dense, tmp_path / "to the last")


def compare_killed_with_undisturbed(base: Path, tmp_path: Path) -> None:
    run(2, move_masks, base, tmp_path / "straight")
    for stage in (2, 3):
        codes = exit_codes(2, move_until_killed, base, tmp_path / "killed", stage)
        assert codes == [-signal.SIGKILL] * 2
        assert finished_steps(tmp_path / f"killed/zero-{stage}/scratch") == [3]
    run(2, move_masks, base, tmp_path / "killed")
    for stage in (2, 3):
        one, other = (
            torch.load(tmp_path / f"{name}/zero-{stage}/found-0") for name in ("straight", "killed")
        )
        assert other["curve"] == one["curve"]
        assert other["state"] == one["state"]
        assert other["model"] == one["model"]
        assert other["share"] == one["share"]
        assert all(torch.equal(other["masks"][name], mask) for name, mask in one["masks"].items())
