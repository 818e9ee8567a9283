"""A run on paper: steps, checkpoints, failures, preemptions and slow machines, event by event.

Failures come at random with a constant rate (exponential gaps), a preemption is announced and saves
first, and a slow machine slows every step of all, for a synchronous step ends with its slowest
worker. Between two events nothing changes, so the simulation goes from one to the next, and is
exact: without events it takes the time that arithmetic says, to the last bit but rounding.

With C the stall of a checkpoint, R the restart, M the mean time between failures and tau the work
between two checkpoints, the share lost is about C / tau + (tau / 2 + R) / M, least at Young's
tau = sqrt(2 C M) (`young.py`; Young 1974, Daly 2006, doi 10.1016/j.future.2004.11.016).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from sparsify.errors import InputError

_SLOWEST = 200  # times as long as its work: then a run gets nowhere, and is ended


@dataclass(frozen=True)
class Job:
    """A run and what may happen to it; seconds unless said otherwise."""

    num_steps: int
    step_s: float
    """of a step when nothing is wrong"""
    interval_steps: int
    """steps between two checkpoints"""
    stall_s: float = 0.0
    """that training pauses for one checkpoint"""
    mtbf_s: float = math.inf
    """mean time between failures of the whole job"""
    restart_s: float = 0.0
    """from a failure until steps go on: noticed, workers started, checkpoint read"""
    preemption_s: float = math.inf
    """mean time between preemptions of the whole job"""
    wait_s: float = 0.0
    """in the queue after a preemption"""
    slow_every_s: float = math.inf
    """mean time until a machine becomes slow, over all machines"""
    slow_for_s: float = 0.0
    """that it stays so, on average"""
    slow_factor: float = 1.0
    """how many times as long a step takes meanwhile; 1 or more"""


@dataclass(frozen=True)
class Run:
    """How one run went; seconds. All but `finish_s` and the counts add up to `finish_s`."""

    finish_s: float
    work_s: float
    """of steps that count, at full speed"""
    lost_s: float
    """of steps and checkpoints that a failure undid"""
    stall_s: float
    """of checkpoints that were finished"""
    restart_s: float
    wait_s: float
    slow_s: float
    """that steps that count took longer beside a slow machine"""
    num_failures: int
    num_preemptions: int

    @property
    def goodput(self) -> float:
        """Share of the time in which steps were made that count, at full speed."""
        return self.work_s / self.finish_s if self.finish_s else 1.0


@dataclass
class _State:
    now: float = 0.0
    steps: float = 0.0
    """done, with the part of the one in work"""
    saved: int = 0
    """steps in the last finished checkpoint"""
    since: dict[str, float] = field(default_factory=lambda: {"slow": 0.0, "stall": 0.0})
    """of time since the last finished checkpoint, by what it was"""
    totals: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("lost", "stall", "restart", "wait", "slow"), 0.0)
    )
    begun_s: float = 0.0
    """when the time since the last checkpoint began"""
    num_failures: int = 0
    num_preemptions: int = 0


def simulate(job: Job, seed: int = 0, failures_s: Sequence[float] | None = None) -> Run:
    """One run from its first step to its last.

    Args:
        job: what runs, and on what.
        seed: of everything random; the same seed, the same run.
        failures_s: when failures come, instead of at random.

    Returns:
        Its time, and where that went.

    Raises:
        InputError: numbers that make no run; or it loses more than it makes, for ever.

    Cost: some microseconds for every checkpoint and event.
    """
    _check(job)
    random = Random(seed)  # noqa: S311  # a simulation, no secret
    failures = iter(failures_s) if failures_s is not None else _times(random, job.mtbf_s)
    preemptions = _times(random, job.preemption_s)
    slow = _SlowSpells(job, random)
    next_failure, next_preemption = next(failures, math.inf), next(preemptions, math.inf)
    state, limit = _State(), _SLOWEST * max(job.num_steps * job.step_s, 1.0)
    while True:
        target = min(state.saved + job.interval_steps, job.num_steps)
        is_last = target == job.num_steps
        stop = min(next_failure, next_preemption)
        at = _advance(state, job, slow, target, stop)
        if at == "done" and not is_last:
            at = _pause(state, job.stall_s, next_failure)
            if at == "done":
                _commit(state, target)
                continue
        elif at == "done":
            break
        if state.now >= next_failure:
            _lose(state, job)
            next_failure = next((t for t in failures if t >= state.now), math.inf)
        elif state.now >= next_preemption:
            state.num_preemptions += 1
            whole = math.floor(state.steps + 1e-9)
            if _pause(state, job.stall_s, next_failure) == "done":
                _drop_part(state, job, whole)
                _commit(state, whole)
                _spend(state, "wait", job.wait_s + job.restart_s)
            next_preemption = next((t for t in preemptions if t >= state.now), math.inf)
        if state.now > limit:
            raise InputError(
                f"simulation: after {state.now / 86400:.0f} days no end is in sight: a failure "
                f"comes every {job.mtbf_s:.0f} s and {job.interval_steps} steps between two "
                f"checkpoints take {job.interval_steps * job.step_s:.0f} s; save more often"
            )
    _settle(state)
    return Run(
        state.now, job.num_steps * job.step_s, state.totals["lost"], state.totals["stall"],
        state.totals["restart"], state.totals["wait"], state.totals["slow"], state.num_failures,
        state.num_preemptions,
    )  # fmt: skip


def _check(job: Job) -> None:
    for name, value, low in (
        ("steps", job.num_steps, 1), ("interval", job.interval_steps, 1),
        ("slow_factor", job.slow_factor, 1), ("step_s", job.step_s, 1e-12),
    ):  # fmt: skip
        if not value >= low:
            raise InputError(f"simulation: {name}={value}: must be at least {low:g}")


def _times(random: Random, mean_s: float) -> Iterator[float]:
    """Moments of a Poisson process."""
    now = 0.0
    while math.isfinite(mean_s):
        now += random.expovariate(1 / mean_s)
        yield now


class _SlowSpells:
    """When some machine is slow; spells that overlap are one."""

    def __init__(self, job: Job, random: Random) -> None:
        self._begins = _times(random, job.slow_every_s if job.slow_factor > 1 else math.inf)
        self._random, self._mean_s = random, job.slow_for_s
        self._spell = self._next(0.0)

    def _next(self, after: float) -> tuple[float, float]:
        begin = max(next(self._begins, math.inf), after)
        if math.isinf(begin) or self._mean_s <= 0:
            return math.inf, math.inf
        return begin, begin + self._random.expovariate(1 / self._mean_s)

    def at(self, now: float) -> tuple[bool, float]:
        """Whether a machine is slow at `now`, and until when that stays so."""
        while self._spell[1] <= now:
            self._spell = self._next(self._spell[1])
        begin, end = self._spell
        return (True, end) if begin <= now else (False, begin)


def _advance(state: _State, job: Job, slow: _SlowSpells, target: int, stop: float) -> str:
    """Make steps up to `target` or until `stop`: "done" or "stopped"."""
    while True:
        is_slow, until = slow.at(state.now)
        step_s = job.step_s * (job.slow_factor if is_slow else 1.0)
        end = state.now + (target - state.steps) * step_s
        moment = min(end, until, stop)
        made = target - state.steps if moment == end else (moment - state.now) / step_s
        state.since["slow"] += made * (step_s - job.step_s)
        state.steps = float(target) if moment == end else state.steps + made
        state.now = moment
        if moment == end:
            return "done"
        if moment == stop:
            return "stopped"


def _pause(state: _State, seconds: float, failure: float) -> str:
    """Write a checkpoint, unless a failure comes first."""
    if state.now + seconds > failure:
        state.now = max(state.now, failure)
        return "stopped"
    state.now += seconds
    state.since["stall"] += seconds
    return "done"


def _commit(state: _State, steps: int) -> None:
    """What was done until here counts."""
    _settle(state)
    state.saved, state.steps = steps, float(steps)


def _settle(state: _State) -> None:
    for name, seconds in state.since.items():
        state.totals[name] += seconds
        state.since[name] = 0.0
    state.begun_s = state.now


def _drop_part(state: _State, job: Job, whole: int) -> None:
    """The part of a step in work when a preemption came is lost."""
    state.totals["lost"] += (state.steps - whole) * job.step_s


def _lose(state: _State, job: Job) -> None:
    state.num_failures += 1
    state.totals["lost"] += state.now - state.begun_s
    state.since = dict.fromkeys(state.since, 0.0)
    state.steps = float(state.saved)
    _spend(state, "restart", job.restart_s)


def _spend(state: _State, name: str, seconds: float) -> None:
    state.now += seconds
    state.totals[name] += seconds
    state.begun_s = state.now


def quantile(values: Iterable[float], share: float) -> float:
    """The value that `share` of `values` do not exceed, between two neighbours in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def best_interval(
    job: Job, candidates: Sequence[int], seeds: Sequence[int]
) -> tuple[int, dict[int, float]]:
    """The interval with the least mean finish, and the mean of each; all meet the same failures.

    Raises:
        InputError: see `simulate`; or there is no candidate.
    """
    if not candidates or not seeds:
        raise InputError("simulation: needs at least one interval and one seed")
    means = {}
    for steps in candidates:
        runs = [simulate(_with_interval(job, steps), seed) for seed in seeds]
        means[steps] = sum(run.finish_s for run in runs) / len(runs)
    return min(means, key=lambda steps: means[steps]), means


def _with_interval(job: Job, steps: int) -> Job:
    return Job(**{**job.__dict__, "interval_steps": steps})
