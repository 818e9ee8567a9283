"""The recovery on paper on 8 to 1,024 GPUs, with failures, preemptions and slow machines."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from conf.schema import PlanJobConfig
from jobs.planning.choices import Recovery
from jobs.planning.layouts import machine_of
from jobs.planning.models import shape_of
from jobs.planning.run import HOST_RATE, STATE_BYTES, recovery_of
from sparsify.costs.simulate import Job, best_interval, quantile, simulate
from sparsify.costs.young import checkpoint_interval_steps
from sparsify.errors import InputError

_FACTORS = (0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83)  # of Young's interval

# The best interval depends on failures alone, of which a run may see none: it is looked for on
# longer runs that see this many.
_FAILURES, _SEEDS = 10, range(2)

_DAY_S = 86_400.0


def simulate_sizes(config: PlanJobConfig) -> dict[str, Any]:
    """Goodput, finish and best interval for every size, as plain values.

    The tokens of the run are the same on every size; the rows of a step are those that were asked
    for, rounded up to as many for every GPU. A layout that fits is taken for each size.

    Raises:
        InputError: nothing fits on any size; or see `simulate.simulate`.
    """
    settings = config.plan
    machine = machine_of(config.of_stage("distill"), settings.memory_share)
    shape, note = shape_of(config.model.path)
    recovery = recovery_of(config, machine, shape)
    rows, left_out = [], []
    gpus = 8
    while gpus <= settings.most_gpus:
        sized = _sized(config, recovery, gpus)
        choice = sized.cheapest()
        if choice is None:
            left_out.append(f"{gpus} GPUs: nothing fits")
        else:
            rows.append(_size(config, sized, choice.step_s, gpus))
        gpus *= 2
    if not rows:
        raise InputError(
            f"plan: {config.model.path} fits no number of {machine.name} up to "
            f"plan.most_gpus={settings.most_gpus}; use larger GPUs"
        )
    return {
        "model": config.model.path, "note": note, "machine": machine.name,
        "tokens": config.distill.num_tokens, "runs": settings.num_runs, "rows": rows,
        "left_out": left_out, "price": settings.price,
    }  # fmt: skip


def _sized(config: PlanJobConfig, recovery: Recovery, gpus: int) -> Recovery:
    """The recovery on another number of GPUs."""
    own = math.ceil(config.distill.batch_size / gpus)
    per_node = recovery.machine.card.gpus_per_node if recovery.machine.card else 8
    local = min(gpus, per_node)
    micro = max(n for n in range(1, recovery.setup.micro_batch_size + 1) if own % n == 0)
    setup = replace(
        recovery.setup, world_size=gpus, gpus_per_node=local, micro_batch_size=micro,
        num_micro_batches=own // micro,
    )  # fmt: skip
    machine = replace(recovery.machine, num_workers=gpus, workers_per_node=local)
    return replace(recovery, setup=setup, machine=machine)


def job_of(config: PlanJobConfig, recovery: Recovery, step_s: float, gpus: int) -> Job:
    """The run on paper, saving as Young has it."""
    settings = config.plan
    rows = math.ceil(config.distill.batch_size / gpus) * gpus
    steps = max(1, config.distill.num_tokens // (rows * config.data.sequence_length))
    mtbf_s = settings.gpu_mtbf_hours * 3600 / gpus
    stall_s = STATE_BYTES * recovery.student.num_parameters / gpus / HOST_RATE
    per_day = settings.preemptions_per_day
    # A hundred machines become slow slow_per_day times a day.
    slow = settings.slow_per_day * (gpus / recovery.setup.gpus_per_node) / 100
    return Job(
        num_steps=steps,
        step_s=step_s,
        # Preemptions are announced and saved before: failures alone lose work.
        interval_steps=checkpoint_interval_steps(max(stall_s, 0.01), step_s, mtbf_s),
        stall_s=stall_s,
        mtbf_s=mtbf_s,
        restart_s=settings.restart_s,
        preemption_s=_DAY_S / per_day if per_day else math.inf,
        wait_s=settings.wait_s,
        slow_every_s=_DAY_S / slow if slow else math.inf,
        slow_for_s=3600 * settings.slow_hours,
        slow_factor=settings.slow_factor,
    )


def _size(config: PlanJobConfig, recovery: Recovery, step_s: float, gpus: int) -> dict[str, Any]:
    job = job_of(config, recovery, step_s, gpus)
    count = config.plan.num_runs
    runs = [simulate(job, seed) for seed in range(count)]
    finish = [run.finish_s for run in runs]
    candidates = sorted({max(1, round(f * job.interval_steps)) for f in _FACTORS})
    longer = replace(job, num_steps=math.ceil(_FAILURES * job.mtbf_s / step_s))
    best, _ = best_interval(longer, candidates, _SEEDS)
    mean = sum(finish) / count
    return {
        "gpus": gpus, "rows": math.ceil(config.distill.batch_size / gpus) * gpus,
        "step_s": step_s, "num_steps": job.num_steps,
        "work_s": job.num_steps * step_s,
        "failures": sum(run.num_failures for run in runs) / count,
        "preemptions": sum(run.num_preemptions for run in runs) / count,
        "goodput": sum(run.goodput for run in runs) / count,
        "finish_s": {str(share): quantile(finish, share) for share in (0.1, 0.5, 0.9)},
        "mean_s": mean, "gpu_hours": mean * gpus / 3600,
        "young_steps": job.interval_steps, "best_steps": best, "stall_s": job.stall_s,
    }  # fmt: skip
