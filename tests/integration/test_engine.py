"""The trainer on two gloo processes: zeros in every copy under every ZeRO stage, exact resume."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from sparsify.errors import InputError
from sparsify.masks import load_masks, save_masks
from sparsify.pattern import Pattern, keep_mask_from_scores

CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module")
def sparse_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with magnitude masks beside it; its weights are still dense."""
    from sparsify.models.load import load_pair, save_model

    folder = tmp_path_factory.mktemp("sparse")
    model, tokenizer = load_pair(tiny_model_dir)
    masks = {
        name: keep_mask_from_scores(module.weight.detach().abs(), Pattern.parse("2:4"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    save_model(model, tokenizer, folder)
    save_masks(folder / "masks" / "masks.safetensors", masks)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_rank(rank: int, port: int, work: Any, *args: Any) -> None:
    """Set up one of two processes and run the work in it."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2",
        LOCAL_RANK=str(rank), LOCAL_SIZE="2",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    work(rank, *args)
    torch.distributed.destroy_process_group()
    # DeepSpeed keeps its process groups, so their threads live on. One that lets go of a tensor
    # while the interpreter shuts down aborts the process (torch 2.13), with the work long done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def two_processes(work: Any, *args: Any) -> None:
    mp.spawn(on_rank, args=(free_port(), work, *args), nprocs=2)


def build(folder: Path, stage: int, precision: str, hooked: bool = True) -> tuple[Any, Any]:
    from conf.stages import DistillConfig
    from jobs import _engine
    from sparsify.masks import apply_masks_, mask_gradients
    from sparsify.models.load import load_model

    model = load_model(folder).train()
    masks = load_masks(folder / "masks" / "masks.safetensors")
    apply_masks_(model, masks)
    if hooked:
        mask_gradients(model, masks)
    settings = DistillConfig(zero_stage=stage, precision=precision, weight_decay=0.1)
    engine = _engine.build_engine(model, settings, 2, uses_gpu=False)
    guard = _engine.MaskGuard(engine, masks)
    guard.clear()
    return engine, guard


def step(engine: Any, number: int, rank: int) -> float:
    generator = torch.Generator().manual_seed(2 * number + rank)
    ids = torch.randint(0, 300, (8, 32), generator=generator)
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].float().numpy().tobytes())
    return digest.hexdigest()


def train_and_check(rank: int, folder: Path, stage: int, precision: str) -> None:
    from jobs import _engine

    engine, guard = build(folder, stage, precision)
    first = step(engine, 0, rank)
    guard.check()
    for number in range(1, 4):
        last = step(engine, 0, rank) if number == 3 else step(engine, number, rank)
        guard.check()
    assert last < first, "it learns"
    copies = {copy for _, copy, _, _ in guard._copies(with_moments=True)}
    masters = set() if stage == 0 else {"fp32 master"}
    assert copies == {"weights", "exp_avg", "exp_avg_sq"} | masters
    state = _engine.gathered_state_dict(engine)
    if rank == 0:
        assert state is not None
        for name, mask in load_masks(folder / "masks" / "masks.safetensors").items():
            weight = state[f"{name}.weight"]
            assert not weight[~mask].any()
            assert weight[mask].count_nonzero() > 0.99 * mask.sum()


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_pruned_weights_stay_zero_in_every_copy(sparse_dir, stage, precision) -> None:
    two_processes(train_and_check, sparse_dir, stage, precision)


def train_without_hooks(rank: int, folder: Path, stage: int) -> None:
    from sparsify.errors import PatternViolationError

    engine, guard = build(folder, stage, "fp32", hooked=False)
    step(engine, 0, rank)
    with pytest.raises(PatternViolationError, match="are not zero in the"):
        guard.check()


@pytest.mark.parametrize("stage", [2, 3])
def test_the_guard_sees_a_mask_that_was_not_held(sparse_dir, stage) -> None:
    two_processes(train_without_hooks, sparse_dir, stage)


def train_straight(rank: int, folder: Path, stage: int, out: Path) -> None:
    from jobs import _engine

    engine, _ = build(folder, stage, "fp32")
    losses = [step(engine, number, rank) for number in range(4)]
    state = _engine.gathered_state_dict(engine)
    if state is not None:
        torch.save({"losses": losses, "hash": weights_hash(state)}, out / "straight")


def train_first_half(rank: int, folder: Path, stage: int, out: Path) -> None:
    from jobs import _engine

    engine, _ = build(folder, stage, "fp32")
    losses = [step(engine, number, rank) for number in range(2)]
    _engine.save_checkpoint(engine, out, 1, {"losses": []})
    _engine.save_checkpoint(engine, out, 2, {"losses": losses})


def train_second_half(rank: int, folder: Path, stage: int, out: Path) -> None:
    from jobs import _engine

    assert _engine.finished_checkpoints(out) == [2], "older checkpoints are removed"
    engine, guard = build(folder, stage, "fp32")
    with pytest.raises(InputError, match="written by 2 workers, this run has 4"):
        _engine.load_checkpoint(engine, out, 2, 4)
    losses = _engine.load_checkpoint(engine, out, 2, 2)["losses"]
    guard.check(with_moments=False)
    losses += [step(engine, number, rank) for number in range(2, 4)]
    guard.check()
    state = _engine.gathered_state_dict(engine)
    if state is not None:
        torch.save({"losses": losses, "hash": weights_hash(state)}, out / "resumed")


@pytest.mark.parametrize("stage", [2, 3])
def test_two_and_two_steps_are_four_to_the_bit(sparse_dir, stage, tmp_path: Path) -> None:
    two_processes(train_straight, sparse_dir, stage, tmp_path)
    two_processes(train_first_half, sparse_dir, stage, tmp_path)
    two_processes(train_second_half, sparse_dir, stage, tmp_path)
    straight, resumed = torch.load(tmp_path / "straight"), torch.load(tmp_path / "resumed")
    assert resumed == straight
