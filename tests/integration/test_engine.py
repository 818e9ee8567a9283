"""The trainer on gloo processes: zeros in every copy under every ZeRO stage, elastic resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.masks.storage import BitMasks, load_masks, save_masks
from sparsify.models.masked import infer_masks
from sparsify.pattern import Pattern
from tests.integration.recoveries import run

CASES = [
    (0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sparse_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with magnitude masks beside it; its weights are still dense."""
    from sparsify.models.load import load_pair
    from sparsify.models.save import save_model

    folder = tmp_path_factory.mktemp("sparse")
    model, tokenizer = load_pair(tiny_model_dir)
    masks = infer_masks(model, Pattern.parse("2:4"), may_be_dense=True)
    save_model(model, tokenizer, folder)
    save_masks(folder / "masks" / "masks.safetensors", masks)
    return folder


def build(folder: Path, stage: int, precision: str, hooked: bool | None = None) -> tuple[Any, Any]:
    """Engine and guard; gradients masked by hooks or not, None: where the recovery has hooks."""
    from conf.options.distill import DistillConfig
    from jobs.training import engine as _engine
    from jobs.training import mask_guard
    from jobs.training.zero import masks_at_step
    from sparsify.models.load import load_model
    from sparsify.models.masked import apply_masks_, mask_gradients

    model = load_model(folder).train()
    masks = load_masks(folder / "masks" / "masks.safetensors")
    apply_masks_(model, masks)
    settings = DistillConfig(
        zero_stage=stage, precision=precision, weight_decay=0.1, micro_batch_size=4
    )
    if hooked is None:
        hooked = not masks_at_step(settings)
    if hooked:
        mask_gradients(model, masks)
    world_size = torch.distributed.get_world_size()
    engine = _engine.build_engine(model, settings, world_size, uses_gpu=False)
    guard = mask_guard.MaskGuard(engine, BitMasks.of(masks), not hooked)
    guard.clear()
    return engine, guard


def step(engine: Any, number: int, rank: int, guard: Any = None) -> float:
    """One optimizer step on 16 rows, whatever the number of processes; a guard masks gradients."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(0, 300, (16, 32), generator=generator)
    rows = rows[rank :: torch.distributed.get_world_size()]
    parts = rows.split(4)
    for part, ids in enumerate(parts):
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        if guard is not None and part + 1 == len(parts):
            guard.mask_gradients()
        engine.step()
    return loss.item()


def train_and_check(rank: int, folder: Path, stage: int, precision: str) -> None:
    from jobs.training import engine as _engine

    engine, guard = build(folder, stage, precision)
    if stage == 2 or (stage == 1 and precision == "fp32"):  # of bf16 stage 1 has no such buffer
        numel = sum(param.numel() for param in engine.module.parameters())
        assert engine.optimizer.reduce_bucket_size == numel, "no larger than what is trained"
    first = step(engine, 0, rank, guard)
    guard.check()
    for number in range(1, 4):
        last = step(engine, 0 if number == 3 else number, rank, guard)
        guard.check()
    assert last < first, "it learns"
    copies = {copy for _, copy, _, _ in guard._copies()}
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
    run(2, train_and_check, sparse_dir, stage, precision)


def train_without_hooks(rank: int, folder: Path, stage: int) -> None:
    from sparsify.errors import PatternViolationError

    engine, guard = build(folder, stage, "fp32", hooked=False)
    step(engine, 0, rank)
    with pytest.raises(PatternViolationError, match="are not zero in the"):
        guard.check()


@pytest.mark.parametrize("stage", [2, 3])
def test_the_guard_sees_a_mask_that_was_not_held(sparse_dir, stage) -> None:
    run(2, train_without_hooks, sparse_dir, stage)


def mask_both_ways(rank: int, folder: Path, stage: int, precision: str) -> None:
    from jobs.training import mask_guard, optimizer, zero_state
    from jobs.training.zero_state import param_numel

    states: list[list[torch.Tensor]] = []
    for hooked in (True, False):
        engine, guard = build(folder, stage, precision, hooked)
        cleared: list[int] = []
        real = mask_guard.clear_pruned_

        def counted(values: torch.Tensor, *rest: Any, _real=real, _cleared=cleared) -> None:
            _cleared.append(values.numel())
            _real(values, *rest)

        mask_guard.clear_pruned_ = counted
        norms = []
        try:
            for number in range(2):
                step(engine, number, rank, guard)
                norms.append(torch.tensor(optimizer.grad_norm(engine)))
                guard.check()
        finally:
            mask_guard.clear_pruned_ = real
        fragments = zero_state.state_fragments(engine, for_saving=False)
        states.append([*norms, *(one.values.clone() for one in fragments)])
        if not hooked:  # of two steps with two micro-batches each
            assert not any(param._backward_hooks for param in guard._weights.values())
            whole = sum(param_numel(param) for param in guard._weights.values())
            sums = torch.tensor([sum(cleared)])
            torch.distributed.all_reduce(sums)
            assert sums.item() == 2 * whole * (2 if stage == 0 else 1)
            assert len(cleared) <= 2 * len(guard._weights)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize(("stage", "precision"), [case for case in CASES if case[0] != 1])
def test_masks_once_a_step_give_the_bits_of_masks_in_every_backward(
    sparse_dir, stage, precision
) -> None:
    """Norm, masters and moments; and every element is masked once, on the worker that keeps it."""
    run(2, mask_both_ways, sparse_dir, stage, precision)


def load(engine: Any, out: Path) -> dict[str, Any]:
    from jobs.training import zero_state
    from jobs.training.checkpoint import Checkpoints, Retention

    found = Checkpoints(out, Retention()).latest(pytest.fail)
    assert found is not None
    _, checkpoint = found
    zero_state.restore(engine, checkpoint, checkpoint.state["num_updates"])
    return checkpoint.state


def train_on(rank: int, folder: Path, stage: int, precision: str, out: Path, number: int) -> None:
    """Load the newest checkpoint, if any, write it out again as it was loaded, train, save."""
    from jobs.training import zero_state
    from jobs.training.checkpoint import Checkpoints, Retention

    engine, guard = build(folder, stage, precision)
    masks = load_masks(folder / "masks" / "masks.safetensors")
    if number:
        load(engine, out)
        guard.check()
        again = Checkpoints(out / "again", Retention())
        state = {"num_updates": zero_state.num_updates(engine)}
        again.save(number, zero_state.state_fragments(engine, True), masks, state)
        again.wait()
        torch.distributed.barrier()
    step(engine, number, rank, guard)
    checkpoints = Checkpoints(out, Retention(num_last=9))
    state = {"num_updates": zero_state.num_updates(engine)}
    checkpoints.save(number + 1, zero_state.state_fragments(engine, True), masks, state)
    checkpoints.wait()
    torch.distributed.barrier()


def whole_state(folder: Path, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Every parameter and moment of a checkpoint, whole."""
    from sparsify.training.fragments import Checkpoint, Fragment

    wanted = [
        Fragment(copy, name, 0, torch.empty(size))
        for name, size in sizes.items()
        for copy in ("weights", "exp_avg", "exp_avg_sq")
    ]
    Checkpoint(folder).fill(wanted)
    return {one.key: one.values for one in wanted}


@pytest.mark.parametrize(
    "stages", [(3, 3, 3), (2, 3, 1)], ids=lambda stages: "-".join(map(str, stages))
)
def test_four_then_two_then_four_workers_carry_every_element_over(
    sparse_dir, tmp_path: Path, stages: tuple[int, int, int]
) -> None:
    from jobs.training.checkpoint import name_of
    from sparsify.models.load import load_model

    (tmp_path / "again").mkdir()
    sizes = {name: p.numel() for name, p in load_model(sparse_dir).named_parameters()}
    states = []
    for number, (size, stage) in enumerate(zip((4, 2, 4), stages, strict=True)):
        run(size, train_on, sparse_dir, stage, "bf16", tmp_path, number)
        states.append(whole_state(tmp_path / name_of(number + 1), sizes))
        if number:
            loaded = whole_state(tmp_path / "again" / name_of(number), sizes)
            before = states[number - 1]
            assert loaded.keys() == before.keys()
            assert all(torch.equal(loaded[key], before[key]) for key in before)
            assert not torch.equal(*(s["weights:lm_head.weight@0"] for s in states[-2:]))


def compare_placements(rank: int, folder: Path, placement: str) -> None:
    from types import SimpleNamespace

    from conf.options.distill import DistillConfig
    from jobs.training.teacher import load_teacher
    from sparsify.data.rows import TokenRows

    context: Any = SimpleNamespace(device="cpu", world_size=2, local_world_size=2, warn=pytest.fail)
    rows = TokenRows.whole(torch.arange(3, 67)[None])
    whole, split = (
        load_teacher(
            folder, DistillConfig(teacher_placement=where), None, context, rows, True
        ).model
        for where in ("replicated", placement)
    )
    weight = split.model.layers[0].mlp.up_proj.weight
    assert weight.to_local().numel() * 2 == weight.numel(), "each worker holds half of it"
    with torch.no_grad():
        for _ in range(2):
            outputs = [m.model(input_ids=rows.ids_NT).last_hidden_state for m in (whole, split)]
            assert torch.equal(*outputs)


@pytest.mark.parametrize("placement", ["node", "sharded"])
def test_a_split_teacher_is_the_teacher_to_the_bit(tiny_model_dir, placement) -> None:
    run(2, compare_placements, tiny_model_dir, placement)
