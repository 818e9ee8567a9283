"""The runs of a sweep (--multirun): submitted as arrays, or done here, in turn or several at once.

A sweep that works here is known to `jobs.manage` by its own folder too, as a run is: cancelled, all
of it stops; the same command continues it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import launch
from cluster.kinds import get_kind
from cluster.kinds._base import DONE, STOPPED, Array, Job, Status
from cluster.kinds.local import LOG, visible_gpus
from jobs.cli import submit
from jobs.cli.command import Command
from sparsify.errors import InputError, StoppedEarlyError, TwofourError
from sparsify.files import write_json

PLAN = "sweep.json"

_POLL_S = 0.5


@dataclass(frozen=True)
class Run:
    """One of a sweep, composed and checked."""

    config: Any
    words: list[str]
    """as people type them, its folder among them"""
    folder: Path


@dataclass(frozen=True)
class Sweep:
    """What `--multirun` makes of its words."""

    command: Command
    typed: str
    """the command line, for a person"""
    folder: Path
    runs: list[Run]

    def __post_init__(self) -> None:
        folders = [run.folder for run in self.runs]
        twice = next((folder for folder in folders if folders.count(folder) > 1), None)
        if twice is not None:
            raise InputError(
                f"{twice}: two runs of the sweep would write there; leave out hydra.sweep.subdir, "
                "or have it name what differs"
            )
        kinds = {getattr(run.config, "cluster", None) and run.config.cluster.kind
                 for run in self.runs}  # fmt: skip
        if len(kinds) > 1:
            raise InputError(
                f"cluster.kind={','.join(sorted(map(str, kinds)))}: all runs of a sweep go to one "
                "kind of cluster; sweep over one at a time"
            )

    @property
    def is_elsewhere(self) -> bool:
        """Whether its runs are submitted."""
        return submit.runs_elsewhere(self.runs[0].config)

    @property
    def job(self) -> Job:
        """Its name, folder and what was typed, for its scheduler."""
        return Job(
            kind=self.runs[0].config.cluster.kind, name=self.folder.name, command=(),
            typed=self.typed, root=str(submit.ROOT), directory=str(Path.cwd()),
            run_dir=str(self.folder),
        )  # fmt: skip

    @property
    def jobs(self) -> list[Job]:
        """That of each run."""
        return [submit.job_of(self.command, run.config, run.words) for run in self.runs]

    @property
    def most_at_once(self) -> int:
        """Runs that work here at the same time."""
        specs = [getattr(run.config, "cluster", None) for run in self.runs]
        return max([1, *(spec.sweep_jobs or 1 for spec in specs if spec is not None)])


def arrays_of(sweep: Sweep) -> list[Array]:
    """The arrays that would be submitted; none for what works here or has no arrays."""
    if not sweep.is_elsewhere:
        return []
    specs = [submit.allocation(run.config) for run in sweep.runs]
    with submit.cluster_mistakes():
        arrays = launch.rendered_sweep(sweep.job, list(zip(specs, sweep.jobs, strict=True)))
    if not arrays and any(spec.sweep_jobs is not None for spec in specs):
        what = f"cluster.kind={sweep.job.kind} takes runs"
        if any(job.parts for job in sweep.jobs):
            what = "runs of several jobs each (cluster.stages) are submitted"
        raise InputError(
            f"cluster.sweep_jobs: {what} one by one, and the scheduler starts them; leave it out"
        )
    return arrays


def describe(sweep: Sweep, arrays: Sequence[Array]) -> str:
    """The arrays as text: which runs, and the script of each."""
    lines = []
    for array in arrays:
        path = array.jobs[0].array
        lines.append(f"--- {path}: {_num_runs(len(array.jobs))}, each with its own config.yaml")
        lines += [f"{job.task}  {job.typed}" for job in array.jobs]
        lines += [f"--- {path}", array.script]
    return "\n".join(lines)


def run_sweep(sweep: Sweep, in_turn: Callable[[], None]) -> None:
    """Do all of it, or submit it.

    Args:
        sweep: see `jobs.cli.compose.planned`.
        in_turn: runs one after another in this process.

    Raises:
        InputError, TwofourError: runs failed, after all that could be done was done.
        StoppedEarlyError: runs have stopped; the same command continues them.
    """
    if sweep.is_elsewhere:
        _write_plan(sweep)
        _submit(sweep)
        return
    if sweep.command.compare is None and sweep.most_at_once == 1:
        in_turn()
        return
    if "TWOFOUR_SUBMITTED" not in os.environ:
        with submit.cluster_mistakes():
            launch.require_ended(sweep.job)
    _write_plan(sweep)
    kept = submit.remembered_here(
        sweep.folder, sweep.command.name, sweep.typed, lambda text: print(text, flush=True)
    )
    with kept:
        # The runs are not what this process may have been submitted for: each has its own record.
        os.environ.pop("TWOFOUR_SUBMITTED", None)
        with _compared(sweep):
            if sweep.most_at_once == 1:
                in_turn()
            else:
                _at_once(sweep)


@contextlib.contextmanager
def _compared(sweep: Sweep) -> Iterator[None]:
    """Show the sweep's table at its end, also when runs have failed."""
    try:
        yield
    except TwofourError:
        _compare(sweep)
        raise
    _compare(sweep)


def _compare(sweep: Sweep) -> None:
    if sweep.command.compare is not None:
        sweep.command.compare(sweep.folder)


def _write_plan(sweep: Sweep) -> None:
    """Keep which runs there are to be: one that never began is missed in no comparison."""
    out = sweep.command.out
    runs = [
        {
            "folder": os.path.relpath(run.folder, sweep.folder),
            "words": [word for word in run.words if not word.startswith(f"{out}=")],
        }
        for run in sweep.runs
    ]
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        write_json(sweep.folder / PLAN, {"schema": 1, "command": sweep.typed, "runs": runs})
    except OSError as error:
        raise InputError(
            f"{sweep.folder}: cannot be written ({error.strerror}); choose another {out}"
        ) from None


def _submit(sweep: Sweep) -> None:
    arrays = arrays_of(sweep)
    for run in sweep.runs:
        if submit.has_files_here(run.config):
            sweep.command.plan(run.config)  # what would refuse a job is said now, not in the queue
    if not arrays:
        _submit_each(sweep)
        return
    files = {
        job.run_dir: submit.job_files(sweep.command, run.config, job)
        for run, job in zip(sweep.runs, sweep.jobs, strict=True)
    }
    with submit.cluster_mistakes():
        launch.submit_arrays(sweep.job, arrays, files)
    print(told(sweep.folder, [launch.find_job(run.folder) for run in sweep.runs]))


def told(folder: Path, jobs: Sequence[Job]) -> str:
    """What to tell somebody who has just submitted the runs of a sweep."""
    where = shlex.quote(str(folder))
    return "\n".join([
        f"submitted: {_num_runs(len(jobs))} of the sweep {folder}",
        *(f"  {job.kind} job {job.id}  {shlex.quote(os.path.relpath(job.run_dir, folder))}"
          for job in jobs),
        f"  status:    python -m jobs.manage status {where}  (or one run's folder)",
        f"  cancel:    python -m jobs.manage cancel {where}",
        f"  compare:   python -m jobs.manage compare {where}",
    ])  # fmt: skip


def _submit_each(sweep: Sweep) -> None:
    """One after another, where the scheduler has no arrays; one that fails hides no other."""
    failed: list[Exception] = []
    for run in sweep.runs:
        try:
            print(submit.submit(sweep.command, run.config, run.words), flush=True)
        except StoppedEarlyError:
            raise
        except TwofourError as error:
            print(f"error: {error}", flush=True)
            failed.append(error)
    if failed:
        kind = InputError if all(isinstance(e, InputError) for e in failed) else TwofourError
        raise kind(f"{_num_runs(len(failed))} of the sweep failed, see above")


def _at_once(sweep: Sweep) -> None:
    """Several at a time, each a process in the background with GPUs of its own."""
    gpus = _gpus_for(sweep)
    waiting = list(sweep.jobs)
    specs = {job.run_dir: run.config.cluster for run, job in zip(sweep.runs, waiting, strict=True)}
    options = {
        job.run_dir: submit.job_files(sweep.command, run.config, job)
        for run, job in zip(sweep.runs, waiting, strict=True)
    }
    running: list[tuple[Job, list[str]]] = []
    ended: dict[str, Status] = {}
    print(_plan_words(sweep, gpus), flush=True)
    kind = get_kind("local")
    try:
        while waiting or running:
            while waiting and len(running) < sweep.most_at_once:
                need = _num_gpus(specs[waiting[0].run_dir]) if gpus is not None else 0
                if gpus is not None and need > len(gpus):
                    break
                job = waiting.pop(0)
                held = [gpus.pop(0) for _ in range(need)] if gpus is not None else []
                with submit.cluster_mistakes(), _only_gpus(held if gpus is not None else None):
                    job = launch.submit(specs[job.run_dir], job, options[job.run_dir])
                running.append((job, held))
                _say(sweep, job, f"started, its output in .cluster/{LOG}")
            time.sleep(_POLL_S)
            for job, held in list(running):
                status = kind.status(job)
                if not status.is_alive:
                    running.remove((job, held))
                    if gpus is not None:
                        gpus += held
                    ended[job.run_dir] = status
                    _say(sweep, job, _ending(job, status))
    except BaseException:
        _stop(sweep, [job for job, _ in running])
        raise
    _raise_for(list(ended.values()))


def _gpus_for(sweep: Sweep) -> list[str] | None:
    """The GPUs that runs are given here; None where no run uses any, or a Ray elsewhere has them.

    Raises:
        InputError: a run needs more than there are.
    """
    most = max(_num_gpus(run.config.cluster) for run in sweep.runs)
    if not most or os.environ.get("RAY_ADDRESS"):
        return None
    found = visible_gpus()
    if most > len(found):
        raise InputError(
            f"cluster.num_workers={most}: a run of the sweep needs as many GPUs, this machine has "
            f"{len(found)}; use fewer workers, or set RAY_ADDRESS to a Ray of several machines"
        )
    return found


def _num_gpus(spec: Any) -> int:
    return math.ceil(spec.num_workers * spec.gpus_per_worker)


@contextlib.contextmanager
def _only_gpus(gpus: list[str] | None) -> Iterator[None]:
    """Have what is started see these GPUs alone; None: all that this process sees."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    if gpus is not None:
        os.environ[name] = ",".join(gpus)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _plan_words(sweep: Sweep, gpus: list[str] | None) -> str:
    words = f"{_num_runs(len(sweep.runs))}, at most {sweep.most_at_once} at a time"
    if gpus is not None:
        return f"{words}, on {len(gpus)} GPUs"
    spec = sweep.runs[0].config.cluster
    cores, used = os.cpu_count() or 1, spec.num_workers * spec.threads_per_worker
    if not os.environ.get("RAY_ADDRESS") and used * sweep.most_at_once > cores:
        words += (
            f"; that is {used * sweep.most_at_once} threads on {cores} cores: fewer at a time are "
            "faster"
        )
    return words


def _say(sweep: Sweep, job: Job, text: str) -> None:
    print(f"{os.path.relpath(job.run_dir, sweep.folder)}: {text}", flush=True)


def _ending(job: Job, status: Status) -> str:
    """How a run ended, with its own words where it has failed."""
    if status.state == DONE:
        return "done"
    said = [line for line in get_kind("local").logs(job) if "error: " in line]
    return f"{status.state} ({status.detail}){f': {said[-1]}' if said else ''}"


def _stop(sweep: Sweep, running: list[Job]) -> None:
    """Have the runs save and stop, and wait for it; a second signal ends the waiting."""
    kind = get_kind("local")
    for job in running:
        _say(sweep, job, kind.cancel(job))
    while any(kind.status(job).is_alive for job in running):
        time.sleep(_POLL_S)


def _raise_for(ended: list[Status]) -> None:
    failed = [status for status in ended if status.state not in (DONE, STOPPED)]
    stopped = [status for status in ended if status.state == STOPPED]
    if failed:
        kind = InputError if all(status.exit_code == 2 for status in failed) else TwofourError
        raise kind(
            f"{_num_runs(len(failed))} of the sweep failed, see above; the same command reuses "
            "what the others have made"
        )
    if stopped:
        raise StoppedEarlyError(
            f"{_num_runs(len(stopped))} of the sweep stopped, see above; the same command continues"
        )


def _num_runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"
