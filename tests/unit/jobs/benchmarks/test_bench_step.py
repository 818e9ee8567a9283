"""The benchmark of a step: both sides run, the stopwatch, the engine without DeepSpeed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cluster.preempt import DrainWatch
from conf.options.distill import DistillConfig
from jobs import bench
from jobs.benchmarks import step
from jobs.benchmarks.sides import step as side_step
from jobs.benchmarks.sides.plain_engine import PlainEngine
from jobs.benchmarks.sides.step import PHASES
from jobs.benchmarks.support import stopwatch
from jobs.training import mask_guard, optimizer, zero_state
from sparsify.errors import InputError, PatternViolationError
from sparsify.masks.storage import BitMasks, mask_to_bits
from sparsify.models.masked import apply_masks_, mask_gradients
from sparsify.models.varlen import VARLEN

TINY = [
    "step", "--shape", "tiny", "--layers", "1", "--vocabulary", "300", "--sequence-length", "16",
    "--batch-size", "4", "--micro-batch-size", "2", "--steps", "2", "--threads", "1",
]  # fmt: skip


def run_tiny(tmp_path, *more: str):
    words = [*TINY, "--engine", "plain", "--workdir", str(tmp_path), *more]
    return step.run(bench.parser().parse_args(words))


@pytest.mark.parametrize("more", [(), ("--precision", "bf16", "--teacher-dtype", "float8")])
def test_both_sides_run_and_every_part_is_seen(tmp_path, more):
    found = run_tiny(tmp_path, *more).figures
    assert len(found["step_s"]) == len(found["alone_s"]) == 2
    assert all(flops > 0 for flops in found["step_flops"])
    assert len(found["losses"]) == 1 + 2 + 1
    assert {name for name in found["parts_s"] if not name.startswith("alone: ")} == {
        *PHASES, "the rest",
    }  # fmt: skip
    assert {name for name in found["parts_s"] if name.startswith("alone: ")} == {
        "alone: teacher", "alone: student forward", "alone: backward",
    }  # fmt: skip
    parts = sum(s for name, s in found["parts_s"].items() if not name.startswith("alone: "))
    assert parts == pytest.approx(found["part_step_s"][0])
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "step").exists()


def test_the_measured_recovery_is_the_same_with_and_without_the_other_side(tmp_path):
    """The models alone run between two steps: they must leave nothing behind in the recovery."""
    both = run_tiny(tmp_path).figures
    one = run_tiny(tmp_path, "--no-baseline").figures
    assert both["losses"] == one["losses"]
    assert "ratio" in both
    assert "ratio" not in one


def test_a_run_that_is_long_enough_to_ask_for_drains_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(DrainWatch, "is_due", lambda self: True)
    assert len(run_tiny(tmp_path, "--no-baseline").figures["losses"]) == 1 + 2 + 1


def test_both_sides_attend_alike(tmp_path, monkeypatch):
    """The ratio compares a step with its arithmetic, so both have to attend in the same way."""
    seen = []

    def arithmetic(watch, student, teacher, parts):
        seen.append([model.config._attn_implementation for model in (student, teacher)])
        return plain(watch, student, teacher, parts)

    plain = side_step._arithmetic
    monkeypatch.setattr(side_step, "_arithmetic", arithmetic)
    losses = [
        run_tiny(tmp_path, "--attention", kind).figures["losses"]
        for kind in ("auto", "varlen", "masked")
    ]
    assert seen == [[VARLEN] * 2, [VARLEN] * 2, ["sdpa"] * 2]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shape", "other"], "--shape other: use one of"),
        (["--layers", "3"], "tiny has 2 layers"),
        (["--micro-batch-size", "3"], "not a multiple"),
        (["--engine", "plain", "--zero-stage", "1"], "nothing is split"),
        (["--steps", "0"], "--steps 0: at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        step.run(bench.parser().parse_args([*TINY, *more, "--workdir", str(tmp_path)]))


def test_a_phase_inside_another_is_taken_from_it(monkeypatch):
    """The clock ticks once per look: outer 2 ticks (before and after), inner 1."""
    ticks = iter(range(100))
    monkeypatch.setattr(stopwatch, "now_s", lambda device: float(next(ticks)))
    watch = stopwatch.Stopwatch("cpu")

    class Model:
        def inner(self) -> int:
            return 1

        def outer(self) -> int:
            return self.inner() + 1

    model = Model()
    watch.watch(model, "inner", "inner")
    watch.watch(model, "outer", "outer")
    assert model.outer() == 2
    assert watch.seconds == {}, "it is off"
    watch.is_on = True
    assert model.outer() == 2
    assert watch.seconds == {"outer": 2.0, "inner": 1.0}


def figures(**changes):
    return {
        "step_s": [2.2, 2.4], "step_wall_s": [2.5, 2.1], "alone_s": [2.0, 2.1],
        "part_step_s": [2.5], "parts_s": {"teacher": 0.5, "optimizer": 0.2, "alone: teacher": 0.4},
        "peak_bytes": 1, "tokens": 230, "step_flops": [24e12, 22e12], "losses": [1.0],
        "num_parameters": 1, **changes,
    }  # fmt: skip


def test_summary_on_a_cpu_promises_the_ratio():
    found = step.summarise(figures(), {}, "cpu", 1)
    assert found.figures["ratio"] == pytest.approx(1.1)
    assert found.figures["ratio_without_optimizer"] == pytest.approx(1.0)
    assert found.figures["tokens_per_s"] == pytest.approx(100)
    assert [target.promised for target in found.targets] == ["<= 1.1"]
    rows = {row[0]: row for row in found.tables[1].rows}
    assert rows["teacher"] == ("teacher", "500.0 ms", "20.00%", "0.2500", "400.0 ms")
    assert rows["the rest"][1] == "1800.0 ms"


def test_summary_on_a_known_gpu_promises_the_mfu():
    found = step.summarise(figures(peak_flops_per_s=20e12, alone_s=[]), {}, "cuda", 1)
    assert found.figures["mfu"] == pytest.approx(0.5)
    assert [(t.promised, t.is_met) for t in found.targets] == [(">= 0.45", True)]
    assert step.summarise(figures(peak_flops_per_s=None), {}, "cuda", 1).targets == []


# The engine without DeepSpeed


def pair(precision: str) -> tuple[nn.Linear, PlainEngine, DistillConfig]:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    config = DistillConfig(
        batch_size=4, micro_batch_size=2, precision=precision, weight_decay=0.1, max_grad_norm=0.5
    )
    other = copy.deepcopy(model)
    return other, PlainEngine(model, config, uses_gpu=False), config


def test_plain_engine_makes_the_steps_of_adamw():
    """Two micro-batches a step, whose mean is the loss; decay of the matrix alone; clipped."""
    model, engine, config = pair("fp32")
    groups = [
        {"params": [model.weight], "weight_decay": 0.1},
        {"params": [model.bias], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    oracle = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, foreach=False)
    for seed in range(3):
        parts = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(seed))
        for part in parts:
            engine.backward(engine(input=part).square().sum())
            engine.step()
        oracle.zero_grad()
        (sum(model(part).square().sum() for part in parts) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert optimizer.grad_norm(engine) == pytest.approx(norm.item(), rel=1e-6)
        oracle.step()
    assert zero_state.num_updates(engine) == 3
    # Only the order of the sums and of AdamW's operations differs: a few float32 roundings.
    torch.testing.assert_close(engine.module.weight, model.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(engine.module.bias, model.bias, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_engine_holds_the_zeros_and_the_guard_sees_every_copy(precision):
    model, _, config = pair(precision)
    wrapped = nn.Sequential(model)
    masks = {"0": torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.5}
    apply_masks_(wrapped, masks)
    mask_gradients(wrapped, masks)
    engine = PlainEngine(wrapped, config, uses_gpu=False)
    guard = mask_guard.MaskGuard(engine, BitMasks.of(masks))
    before = [values.clone() for _, _, values, _ in guard._copies()]
    for number in range(4):
        part = torch.randn(2, 8, generator=torch.Generator().manual_seed(number))
        engine.backward(engine(input=part.to(model.weight.dtype)).float().square().sum())
        engine.step()
    guard.check()
    copies = list(guard._copies())
    masters = {"fp32 master"} if precision == "bf16" else set()
    assert {copy for _, copy, _, _ in copies} == {"weights", "exp_avg", "exp_avg_sq"} | masters
    for (_, name, values, pruned), old in zip(copies, before, strict=True):
        assert not torch.equal(values, old), "it learns"
        place = pruned.nonzero()[-1]
        for bad in (float("nan"), 1e-38):
            values.data[place] = bad
            with pytest.raises(PatternViolationError, match=f"1 pruned elements of 0 .* {name};"):
                guard.check()
        values.data[place] = 0.0
    guard.check()
    if precision == "bf16":
        master = next(values for _, name, values, _ in copies if name == "fp32 master")
        assert torch.equal(wrapped[0].weight.view(-1), master.bfloat16())


def test_bits_of_a_slice_are_those_of_the_mask():
    """Slices of ranks begin anywhere, and the last ones may lie in ZeRO's padding."""
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = mask_to_bits(mask)
    for start in range(60):
        for numel in (0, 1, 7, 20):
            stop = min(start + numel, mask.numel())
            expected = ~mask.flatten()[start:stop]
            bits = packed[start // 8 : -(-stop // 8)]
            assert torch.equal(mask_guard._pruned(bits, start, stop), expected)
