"""Submits commands, and finds what was submitted again: one folder RUN/.cluster for each run."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

from cluster.errors import ClusterError
from cluster.kinds import kind_of
from cluster.kinds._base import Job
from cluster.kinds._chain import Chain
from cluster.spec import ClusterSpec

RECORD = "job.json"


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
    _not_alive(job)
    _private_folder(job.folder)
    for name, text in written.items():
        _write(job.folder / name, text)
    return _start(job)


def resume(run_dir: Path, is_made: Callable[[str], bool] = lambda _: False) -> Job:
    """Submit a run's job again, as it was; of one in parts those that are left.

    Args:
        run_dir: the run's folder.
        is_made: whether the job has finished a stage, where its scheduler has forgotten it.

    Raises:
        ClusterError: it has none, it is still there, or it is refused.
    """
    job = find_job(run_dir)
    _not_alive(job)
    _private_folder(job.folder)
    kind = kind_of(job)
    return _start(kind.left(job, is_made) if isinstance(kind, Chain) else job)


def find_job(run_dir: Path) -> Job:
    """The job of a run.

    Raises:
        ClusterError: nothing was submitted for this run, or its record cannot be read.
    """
    path = run_dir.absolute() / ".cluster" / RECORD
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


def find_jobs(folder: Path) -> list[Job]:
    """The jobs of all runs in a folder, two levels deep, by name."""
    records = [*folder.glob(f"*/.cluster/{RECORD}"), *folder.glob(f"*/*/.cluster/{RECORD}")]
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


def _not_alive(job: Job) -> None:
    """Require that the run has no job that may still write to it."""
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
