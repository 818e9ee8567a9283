"""The simulated run against what arithmetic says of runs that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sparsify.costs.simulate import Job, best_interval, quantile, simulate
from sparsify.costs.young import checkpoint_interval_steps
from sparsify.errors import InputError

QUIET = Job(num_steps=1000, step_s=2.0, interval_steps=60, stall_s=5.0, restart_s=120.0)


def adds_up(run) -> bool:
    parts = run.work_s + run.lost_s + run.stall_s + run.restart_s + run.wait_s + run.slow_s
    return parts == pytest.approx(run.finish_s, rel=1e-9)


def test_without_events_it_takes_its_steps_and_its_checkpoints() -> None:
    run = simulate(QUIET)
    # The last steps need no checkpoint: what follows is the result itself.
    assert run.finish_s == pytest.approx(1000 * 2.0 + 16 * 5.0)
    assert run.goodput == pytest.approx(2000 / 2080)
    assert (run.num_failures, run.lost_s, run.restart_s) == (0, 0, 0)
    assert simulate(replace(QUIET, stall_s=0.0)).finish_s == pytest.approx(2000.0)


@pytest.mark.parametrize("into_s", [1.0, 60.0, 119.0])
def test_one_failure_costs_what_was_done_since_the_checkpoint_and_the_restart(into_s) -> None:
    quiet = simulate(QUIET)
    third_s = 3 * (60 * 2.0 + 5.0)  # three checkpoints are finished
    run = simulate(QUIET, failures_s=[third_s + into_s])
    assert run.finish_s == pytest.approx(quiet.finish_s + into_s + 120.0)
    assert run.lost_s == pytest.approx(into_s)
    assert adds_up(run)


def test_a_failure_inside_a_checkpoint_loses_the_whole_interval() -> None:
    run = simulate(QUIET, failures_s=[60 * 2.0 + 4.0])
    assert run.lost_s == pytest.approx(124.0)
    assert run.finish_s == pytest.approx(simulate(QUIET).finish_s + 124.0 + 120.0)


def test_share_lost_is_youngs() -> None:
    mtbf_s = 20_000.0
    job = replace(QUIET, num_steps=20_000, mtbf_s=mtbf_s, interval_steps=200)
    runs = [simulate(job, seed) for seed in range(60)]
    assert all(adds_up(run) for run in runs)
    share = sum(run.finish_s for run in runs) / len(runs) / (20_000 * 2.0) - 1
    tau = 200 * 2.0
    expected = job.stall_s / tau + (tau / 2 + job.restart_s) / mtbf_s  # to first order
    assert share == pytest.approx(expected, rel=0.1)


def test_the_best_interval_is_youngs() -> None:
    mtbf_s = 20_000.0
    job = replace(QUIET, num_steps=20_000, mtbf_s=mtbf_s)
    young = checkpoint_interval_steps(job.stall_s, job.step_s, mtbf_s)
    assert young == round(math.sqrt(2 * 5.0 * mtbf_s) / 2.0)
    candidates = [max(1, round(young * factor)) for factor in (0.2, 0.5, 1, 2, 5)]
    best, means = best_interval(job, candidates, range(40))
    assert best in candidates[1:4]  # the curve is flat around its least
    assert means[candidates[0]] > means[candidates[2]] < means[candidates[4]]


def test_a_preemption_saves_first_and_waits_in_the_queue() -> None:
    job = replace(QUIET, preemption_s=700.0, wait_s=300.0)
    run = simulate(job, seed=1)
    assert run.num_preemptions > 0
    assert run.wait_s == pytest.approx(run.num_preemptions * 420.0)
    assert run.lost_s <= run.num_preemptions * job.step_s  # parts of a step alone
    assert adds_up(run)


def test_a_machine_that_is_always_slow_slows_every_step() -> None:
    job = replace(QUIET, slow_every_s=1e-9, slow_for_s=1e12, slow_factor=1.5)
    run = simulate(job, seed=0)
    assert run.finish_s == pytest.approx(1.5 * 2000 + 16 * 5.0)
    assert run.slow_s == pytest.approx(1000.0)


def test_equal_seeds_are_equal_and_others_are_not() -> None:
    job = replace(QUIET, mtbf_s=300.0)
    assert simulate(job, 7) == simulate(job, 7)
    assert simulate(job, 7) != simulate(job, 8)


def test_a_run_that_never_ends_is_refused() -> None:
    job = Job(num_steps=100, step_s=10.0, interval_steps=100, mtbf_s=10.0, restart_s=10.0)
    with pytest.raises(InputError, match="save more often"):
        simulate(job)


def test_quantiles() -> None:
    assert [quantile([3, 1, 2], share) for share in (0, 0.5, 0.75, 1)] == [1, 2, 2.5, 3]
