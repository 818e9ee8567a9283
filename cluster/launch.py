"""Submits commands, and finds what was submitted again: one folder RUN/.cluster for each run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cluster.errors import ClusterError
from cluster.kinds import get_kind, kind_of
from cluster.kinds._base import Array, Job, Kind
from cluster.kinds._chain import Chain
from cluster.spec import ClusterSpec

RECORD = "job.json"

RECORD_PATH = f".cluster/{RECORD}"
"""of a run's folder"""


def rendered(spec: ClusterSpec, job: Job) -> dict[str, str]:
    """Name -> text of the files with which the job would be submitted; touches nothing."""
    return kind_of(job).files(spec, job)


def submit(spec: ClusterSpec, job: Job, files: dict[str, str]) -> Job:
    """Write the job's files and hand it to its scheduler.

    Args:
        spec: of the cluster.
        job: without an id.
        files: name -> text of files of the caller's, beside those of the kind.

    Returns:
        The job with its id.

    Raises:
        ClusterError: it is refused, or the run has a job already; nothing is left running.
    """
    kind = kind_of(job)
    written = {**files, **kind.files(spec, job)}
    require_ended(job)
    _private_folder(job.folder)
    for name, text in written.items():
        _write(job.folder / name, text)
    return _start(job)


def rendered_sweep(sweep: Job, runs: Sequence[tuple[ClusterSpec, Job]]) -> list[Array]:
    """The arrays as which the runs of a sweep would be submitted; touches nothing.

    None where the scheduler has no arrays: each run is a job of its own then.
    """
    return get_kind(sweep.kind).arrays(sweep, runs)


def submit_arrays(sweep: Job, arrays: Sequence[Array], files: dict[str, dict[str, str]]) -> None:
    """Write the files of a sweep's arrays and hand these to the scheduler.

    Args:
        sweep: as `rendered_sweep` was told.
        arrays: of `rendered_sweep`.
        files: run's folder -> name -> text of files of the caller's.

    Raises:
        ClusterError: one is refused, or a run has a job already. Arrays before it are submitted.
    """
    jobs = [job for array in arrays for job in array.jobs]
    for job in [sweep, *jobs]:
        require_ended(job)
    _private_folder(sweep.folder)
    (sweep.folder / RECORD).unlink(missing_ok=True)  # of a sweep that ran where it was typed
    for array in arrays:
        _write(Path(array.jobs[0].array), array.script)
        for job in array.jobs:
            _private_folder(job.folder)
            _link(job.folder / array.link, Path(job.array))
            _link(sweep.folder / job.task, job.folder)
            for name, text in files[job.run_dir].items():
                _write(job.folder / name, text)
    for array in arrays:
        _start_array(get_kind(sweep.kind), array.jobs)


def resume_all(
    jobs: Sequence[Job], is_made: Callable[[Job, str], bool] = lambda *_: False
) -> list[Job]:
    """Submit several jobs again, as they were: those of an array as one, of one in parts what is
    left of it.

    Args:
        jobs: that have ended.
        is_made: whether a job has finished a stage, where its scheduler has forgotten it.

    Raises:
        ClusterError: one is still there, or is refused; those before it are submitted.
    """
    started: list[Job] = []
    for job in jobs:
        require_ended(job)
        _private_folder(job.folder)
    for (name, array), group in itertools.groupby(
        sorted(jobs, key=lambda job: (job.array, int(job.task or 0))),
        key=lambda job: (job.kind, job.array),
    ):
        members = list(group)
        if array:
            started += _start_array(get_kind(name), members)
            continue
        for job in members:
            kind = kind_of(job)
            again = kind.left(job, partial(is_made, job)) if isinstance(kind, Chain) else job
            started.append(_start(again))
    return started


def resume(run_dir: Path, is_made: Callable[[Job, str], bool] = lambda *_: False) -> Job:
    """Submit a run's job again, as it was; see `resume_all`.

    Raises:
        ClusterError: it has none, it is still there, or it is refused.
    """
    return resume_all([find_job(run_dir)], is_made)[0]


def find_job(run_dir: Path) -> Job:
    """The job of a run.

    Raises:
        ClusterError: nothing was submitted for this run, or its record cannot be read.
    """
    path = run_dir.absolute() / RECORD_PATH
    try:
        found = path.parent.lstat()
        if not _is_own(found) or found.st_mode & 0o022:
            raise ClusterError(
                f"{path.parent}: others may have written it, so its record is not followed"
            )
        known = json.loads(path.read_text(encoding="utf-8"))
        parts = tuple(tuple(stages) for stages in known.get("parts", ()))
        job = Job(**{**known, "command": tuple(known["command"]), "parts": parts})
        return dataclasses.replace(job, run_dir=str(run_dir.absolute()))
    except FileNotFoundError:
        raise ClusterError(f"{run_dir}: no command was started for this folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def find_jobs(folder: Path, depth: int = 2) -> list[Job]:
    """The jobs of all runs in a folder, so many levels deep, by name."""
    records = [
        path for level in range(1, depth + 1) for path in folder.glob("*/" * level + RECORD_PATH)
    ]
    return [find_job(path.parents[1]) for path in sorted(records)]


def remember(job: Job) -> None:
    """Keep the job's record in its folder.

    Raises:
        ClusterError: the folder is not its owner's alone.
    """
    _private_folder(job.folder)
    _write(job.folder / RECORD, json.dumps(dataclasses.asdict(job), indent=2) + "\n")


def _start(job: Job) -> Job:
    started = dataclasses.replace(job, id=kind_of(job).submit(job))
    remember(started)
    return started


def _start_array(kind: Kind, jobs: Sequence[Job]) -> list[Job]:
    started = [
        dataclasses.replace(job, id=number)
        for job, number in zip(jobs, kind.submit_array(jobs), strict=True)
    ]
    for job in started:
        remember(job)
    return started


def require_ended(job: Job) -> None:
    """Require that the run has no job that may still write to it.

    Raises:
        ClusterError: it has.
    """
    try:
        before = find_job(Path(job.run_dir))
    except ClusterError:  # none, or one that nobody can follow
        return
    status = kind_of(before).status(before)
    if status.is_alive:
        raise ClusterError(
            f"{job.run_dir}: has a job already, {before.kind} {before.id} ({status.state}"
            f"{': ' if status.detail else ''}{status.detail}); follow it with `python -m "
            "jobs.manage logs`, end it with `cancel`, or choose another run.dir"
        )


def _private_folder(folder: Path) -> None:
    """Make the folder for its owner alone; what is in it is run, and it may hold a token."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(folder.lstat()):
            raise ClusterError(f"{folder}: is not a folder of yours; choose another run.dir")
        folder.chmod(0o700)
    except OSError as error:
        raise ClusterError(f"{folder}: cannot be made ({error.strerror})") from None


def _is_own(found: os.stat_result) -> bool:
    """Whether it is a folder, and no link, of the user who runs this."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _link(path: Path, target: Path) -> None:
    """A link, in the place of an earlier one."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(path)
    except OSError as error:
        raise ClusterError(f"{path}: cannot be made ({error.strerror})") from None


def _write(path: Path, text: str) -> None:
    """A file for its owner alone, whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written ({error.strerror})") from None
