"""Bad steps, deterministic failures, replicas that differ, and how often to save."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

import pytest
import torch

from cluster.runtime.restarts import Restarts
from sparsify.costs.young import checkpoint_interval_steps
from sparsify.errors import InputError
from sparsify.training.health import SpikeGuard, SpikePolicy, checksum


def losses(seed: int = 0) -> Iterator[float]:
    """A loss that falls fast, then slowly, with 8 % of noise: what the recoveries look like."""
    drawn = random.Random(seed)
    step = 0
    while True:
        step += 1
        yield (0.1 + 2 / step**0.5) * math.exp(0.08 * drawn.gauss(0, 1))


def trained(policy: SpikePolicy, num_steps: int = 100) -> SpikeGuard:
    guard = SpikeGuard(policy)
    for step, loss in zip(range(1, num_steps + 1), losses(), strict=False):
        assert guard.judge(step, loss, 3 * loss).action == "ok"
    return guard


def test_sound_training_is_never_bad() -> None:
    for seed in range(20):
        guard = SpikeGuard(SpikePolicy())
        verdicts = [
            guard.judge(step, loss, 3 * loss).action
            for step, loss in zip(range(400), losses(seed), strict=False)
        ]
        assert set(verdicts) == {"ok"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 30.0])
@pytest.mark.parametrize("place", ["loss", "norm"])
def test_one_bad_step_is_left_out(bad: float, place: str) -> None:
    guard = trained(SpikePolicy(policy="skip"))
    figures = (bad, 0.9) if place == "loss" else (0.3, 10 * bad)
    verdict = guard.judge(101, *figures)
    assert verdict.action == "skip"
    assert "step 101" in verdict.reason
    assert guard.judge(102, 0.3, 0.9).action == "ok"
    assert guard.num_skipped == 1


def test_nan_is_bad_from_the_first_step_and_a_spike_is_not() -> None:
    guard = SpikeGuard(SpikePolicy(policy="skip"))
    assert guard.judge(1, math.nan, 1.0).action == "skip"
    assert guard.judge(2, 5.0, 1.0).action == "ok"
    assert guard.judge(3, 5e6, 1.0).action == "ok"  # nothing to compare it with yet


def test_spikes_do_not_enter_the_window() -> None:
    """Else a run that has gone wrong would soon look normal."""
    guard = trained(SpikePolicy(policy="skip", max_in_row=10**6))
    for step in range(101, 1000):
        assert guard.judge(step, 30.0, 1.0).action == "skip"


def test_stop_at_the_first() -> None:
    verdict = trained(SpikePolicy(policy="stop")).judge(101, 30.0, 1.0)
    assert verdict.action == "stop"
    assert "spreads over the median" in verdict.reason


def test_skip_stops_after_too_many_in_a_row() -> None:
    guard = trained(SpikePolicy(policy="skip", max_in_row=2))
    actions = [guard.judge(step, math.nan, 1.0).action for step in (101, 102, 103)]
    assert actions == ["skip", "skip", "stop"]


def test_rollback_condemns_the_bad_steps_and_has_a_limit() -> None:
    guard = trained(SpikePolicy(policy="rollback", max_in_row=1, max_rollbacks=1))
    saved = guard.state_dict()
    for step in (101, 102):
        assert guard.judge(step, 0.3, 0.9).action == "ok"
    assert guard.judge(103, math.nan, 1.0).action == "skip"
    assert guard.judge(104, math.nan, 1.0).action == "rollback"
    guard.rolled_back(saved)
    assert guard.num_rollbacks == 1
    replayed = [guard.judge(step, 0.3, 0.9).action for step in (101, 102, 103, 104, 105)]
    assert replayed == ["ok", "ok", "skip", "skip", "ok"]
    assert guard.judge(106, math.nan, 1.0).action == "skip"
    last = guard.judge(107, math.nan, 1.0)
    assert last.action == "stop"
    assert "after 1 rollbacks" in last.reason


def test_guard_goes_on_from_its_state() -> None:
    """Through JSON, as it travels in a checkpoint; a state of the start is one too."""
    guard = trained(SpikePolicy())
    guard.judge(101, math.nan, 1.0)
    other = SpikeGuard(SpikePolicy())
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for step, loss in ((102, 0.3), (103, 40.0), (104, math.nan), (105, 0.3)):
        assert guard.judge(step, loss, 1.0) == other.judge(step, loss, 1.0)
    assert guard.state_dict() == other.state_dict()
    guard.rolled_back(None)
    assert guard.state_dict()["losses"] == []
    assert guard.num_skipped > 0


@pytest.mark.parametrize(
    "wrong",
    [{"policy": "hope"}, {"window": 4}, {"min_steps": 200}, {"loss_threshold": math.nan},
     {"max_rollbacks": -1}],
)  # fmt: skip
def test_wrong_policy_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SpikePolicy(**wrong)


# checksum ---------------------------------------------------------------------------------------

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.uint8, torch.bool,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
    before = checksum([tensor])
    bits = tensor.flatten().view(torch.uint8)
    seen = {before}
    for byte in range(len(bits)):
        for bit in range(8):
            bits[byte] ^= 1 << bit
            seen.add(checksum([tensor]))
            assert checksum([tensor]) != before
            bits[byte] ^= 1 << bit
    assert checksum([tensor]) == before
    assert all(0 <= value < 2**63 for value in seen)


def test_checksum_against_integers_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition with Python's integers; also when a tensor comes in several chunks."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(7, 9, generator=generator), torch.randn(50, generator=generator).half()]
    expected = 0
    for tensor in tensors:
        size = tensor.element_size()
        raw = tensor.flatten().view(torch.uint8).numpy().tobytes()
        parts = [raw[i : i + size] for i in range(0, len(raw), size)]
        total = sum(int.from_bytes(part, "little", signed=True) for part in parts)
        expected = (expected * 0x9E3779B97F4A7C15 + total) % 2**63
    assert checksum(tensors) == expected
    monkeypatch.setattr("sparsify.training.health._CHECKSUM_CHUNK", 8)
    assert checksum(tensors) == expected


def test_checksum_sees_order_of_tensors_strides_and_nan() -> None:
    first, second = torch.arange(6.0).view(2, 3), torch.full((4,), math.nan)
    assert checksum([first, second]) != checksum([second, first])
    assert checksum([first, second]) == checksum([first.clone(), second.clone()])
    assert checksum([first.T]) == checksum([first.T.contiguous()])
    assert checksum([torch.zeros(1)]) != checksum([-torch.zeros(1)])
    assert checksum([]) == 0
    assert checksum([torch.empty(0)]) == 0


# losses of workers ------------------------------------------------------------------------------


def outcomes(most: int, steps: list[int | None]) -> list[bool]:
    """Whether each loss at these steps is answered by a restart."""
    restarts = Restarts(most)
    return [restarts.after_loss(step)[0] for step in steps]


def test_losses_have_a_budget_that_progress_fills_again() -> None:
    assert outcomes(2, [10, 10, 50, 50, 50]) == [True, True, True, True, False]  # 40 steps further
    assert outcomes(0, [None]) == [False]


def test_falling_back_to_an_older_checkpoint_is_no_progress() -> None:
    assert outcomes(2, [50, 40, 45]) == [True, True, False]


def test_the_reason_names_the_furthest_step_also_when_the_last_try_made_none() -> None:
    restarts = Restarts(1)
    assert restarts.after_loss(50) == (
        True, "worker lost at step 50; retried, 0 more without progress",
    )  # fmt: skip
    is_retried, reason = restarts.after_loss(None)
    assert not is_retried
    assert "without progress since step 50" in reason
    assert "since the start" in Restarts(0).after_loss(None)[1]


# how often to save ------------------------------------------------------------------------------


def lost_share(interval_s: float, stall_s: float, mtbf_s: float) -> float:
    """Share of the time that checkpoints and the replays behind failures take."""
    return stall_s / interval_s + interval_s / (2 * mtbf_s)


@pytest.mark.parametrize(
    ("stall_s", "mtbf_h", "minutes", "percent"),
    [
        (2, 1584, 80, 0.08), (2, 24, 10, 0.7), (2, 6, 5, 1.4), (5, 1584, 126, 0.13),
        (5, 24, 15, 1.1), (5, 6, 8, 2.2), (30, 1584, 5.1 * 60, None), (30, 24, 38, 2.6),
        (30, 6, 19, 5.3),
    ],
)  # fmt: skip
def test_youngs_table(stall_s: float, mtbf_h: float, minutes: float, percent: float) -> None:
    """Stalls of 2, 5 and 30 s on 32 GPUs, with preemption, on spot machines; the
    table's figures are rounded to minutes, the longest to a tenth of an hour."""
    interval_s = checkpoint_interval_steps(stall_s, 1.0, 3600 * mtbf_h)
    assert interval_s / 60 == pytest.approx(minutes, abs=0.6, rel=0.01)
    if percent is not None:
        assert 100 * lost_share(interval_s, stall_s, 3600 * mtbf_h) == pytest.approx(
            percent, abs=0.06
        )


def test_youngs_interval_loses_least() -> None:
    stall_s, mtbf_s = 3.0, 5000.0
    best = checkpoint_interval_steps(stall_s, 1.0, mtbf_s)
    least = lost_share(best, stall_s, mtbf_s)
    assert least == pytest.approx(math.sqrt(2 * stall_s / mtbf_s), rel=1e-5)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert lost_share(factor * best, stall_s, mtbf_s) > least


def test_interval_in_steps() -> None:
    # sqrt(2 x 5 x 86400) = 929.5 s; a step of 7.4 s: 125.6 steps.
    assert checkpoint_interval_steps(5.0, 7.4, 86400.0) == 126
    assert checkpoint_interval_steps(0.0, 7.4, 86400.0) == 1
    assert checkpoint_interval_steps(1e-9, 1.0, 1.0) == 1
