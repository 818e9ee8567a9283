"""The jobs of runs: `python -m jobs.manage list|status|logs|cancel|resume|compare [RUN]`.

For every kind of cluster (cluster.kind), by what the run's folder says of its job. The folder of a
sweep stands for all of its runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import launch
from cluster.errors import ClusterError
from cluster.kinds import kind_of
from cluster.kinds._base import DONE, RUNNING, STOPPED, Job, Status
from conf.options.run import STAGES
from jobs.cli import sweep
from jobs.cli.submit import ask, cluster_mistakes, told
from jobs.reporting.compared import compare
from sparsify.errors import InputError

_EXIT_INPUT = 2

_RUNS = Path("runs")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m jobs.manage",
        description="What has become of runs that were started or submitted, and what to do next.",
        epilog="EXAMPLES\n  python -m jobs.manage list\n"
        "  python -m jobs.manage logs runs/first --follow\n"
        "  python -m jobs.manage cancel runs/first  (saves first where the stage can)\n"
        "  python -m jobs.manage compare runs/sweep",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the jobs of all runs in a folder")
    listing.add_argument("folder", type=Path, nargs="?", default=_RUNS, metavar="FOLDER")
    for name, text in (
        ("status", "where the run's job is, and which of its stages are finished"),
        ("logs", "what it has printed"),
        ("cancel", "ask it to save and stop"),
        ("resume", "submit it again as it was; it carries on from what is saved"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument(
            "run", type=Path, nargs="?", metavar="RUN",
            help=f"the run's folder, or a sweep's (default: the last one started in {_RUNS})",
        )  # fmt: skip
        if name == "logs":
            action.add_argument("--follow", "-f", action="store_true", help="until the job ends")
        if name == "cancel":
            action.add_argument("--now", action="store_true", help="end it without saving")
    text = "the runs of a sweep in a table, a page, and files for scripts"
    comparing = actions.add_parser("compare", help=text, description=text)
    comparing.add_argument("folder", type=Path, metavar="SWEEP", help="folder that holds the runs")
    return top


def main(argv: list[str] | None = None) -> int:
    """Do what was asked; the exit code, with logs --follow that of the job."""
    options = parser().parse_args(argv)
    try:
        with cluster_mistakes():
            if options.action == "list":
                return _list(options.folder)
            if options.action == "compare":
                compare(options.folder)
                return 0
            run = options.run or _latest()
            if runs := launch.find_jobs(run, depth=1):
                return int(globals()[f"_{options.action}_sweep"](run, runs, options))
            job = launch.find_job(run)
            return int(globals()[f"_{options.action}"](job, options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_INPUT
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _latest() -> Path:
    jobs = launch.find_jobs(_RUNS)
    if not jobs:
        raise InputError(f"{_RUNS}: no run was started in this folder; name one")
    run_dir = max(jobs, key=lambda job: (job.folder / launch.RECORD).stat().st_mtime).run_dir
    print(f"{run_dir}:", file=sys.stderr)
    return Path(run_dir)


def _list(folder: Path) -> int:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the one that holds the runs")
    jobs = launch.find_jobs(folder)
    if not jobs:
        print(f"{folder}: no run was started in this folder")
        return 0
    _show(jobs)
    return 0


def _show(jobs: Sequence[Job]) -> list[Status]:
    """Print a line for each job; where they are."""
    rows, found = [("RUN", "KIND", "JOB", "STATE", "")], []
    for job in jobs:
        try:
            status = kind_of(job).status(job)
        except ClusterError as error:  # one scheduler that does not answer hides no other's jobs
            status = Status("unknown", " ".join(str(error).split()))
        found.append(status)
        rows.append((os.path.relpath(job.run_dir), job.kind, job.id, status.state, status.detail))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row[:4], widths, strict=True)]
        print("  ".join([*cells, row[4]]).rstrip())
    return found


def _status(job: Job, _: argparse.Namespace) -> int:
    status = kind_of(job).status(job)
    print(f"{job.kind} job {job.id}: {status.state}{f' ({status.detail})' * bool(status.detail)}")
    done = [stage for stage in STAGES if (Path(job.run_dir) / stage / "record.json").is_file()]
    print(f"finished stages: {', '.join(done) or 'none'}")
    print(f"command: {job.typed}")
    if status.is_alive:
        print("\n".join(kind_of(job).hints(job)))
    elif status.state != DONE:
        print(f"carry on with: python -m jobs.manage resume {job.run_dir}")
    return 0


def _logs(job: Job, options: argparse.Namespace) -> int:
    kind = kind_of(job)
    if not options.follow:
        for line in kind.logs(job):
            print(line)
        return 0
    status = kind.attach(job, lambda line: print(line, flush=True), ask)
    if status.is_alive:
        return 0
    return {DONE: 0, STOPPED: os.EX_TEMPFAIL}.get(status.state, status.exit_code or 1)


def _cancel(job: Job, options: argparse.Namespace) -> int:
    kind = kind_of(job)
    status = kind.status(job)
    if not status.is_alive:
        print(f"{job.run_dir}: {job.kind} job {job.id} has ended already ({status.detail})")
        return 0
    print(kind.cancel(job, options.now))
    return 0


def _resume(job: Job, _: argparse.Namespace) -> int:
    print(told(launch.resume(Path(job.run_dir), _is_made)))
    return 0


def _is_made(job: Job, stage: str) -> bool:
    """Whether the job has finished a stage since it was submitted."""
    submitted_s = max((path.stat().st_mtime for path in job.folder.glob("*.yaml")), default=0.0)
    record = Path(job.run_dir) / stage / "record.json"
    return record.is_file() and record.stat().st_mtime > submitted_s


def _own(folder: Path) -> Job | None:
    """The process that works on a whole sweep here; None where its runs were submitted."""
    return launch.find_job(folder) if (folder / launch.RECORD_PATH).exists() else None


def _status_sweep(folder: Path, runs: Sequence[Job], _: argparse.Namespace) -> int:
    own = _own(folder)
    found = _show([own, *runs] if own else runs)
    states = [status.state for status in found[1 if own else 0 :]]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    if not any(status.is_alive for status in found) and set(states) != {DONE}:
        print(f"carry on with: python -m jobs.manage resume {folder}")
    return 0


def _logs_sweep(folder: Path, runs: Sequence[Job], options: argparse.Namespace) -> int:
    own = _own(folder)
    if own is None:
        raise InputError(
            f"{folder}: is a sweep of {len(runs)} runs; name one, such as {runs[0].run_dir}"
        )
    return _logs(own, options)


def _cancel_sweep(folder: Path, runs: Sequence[Job], options: argparse.Namespace) -> int:
    own = _own(folder)
    if own is not None and kind_of(own).status(own).is_alive:
        return _cancel(own, options)
    alive = [(job, status) for job in runs if (status := kind_of(job).status(job)).is_alive]
    # Those that wait first: one that ends would make room for the next.
    alive.sort(key=lambda found: found[1].state == RUNNING)
    for job, _status in alive:
        print(kind_of(job).cancel(job, options.now))
    if not alive:
        print(f"{folder}: all of its runs have ended already")
    return 0


def _resume_sweep(folder: Path, runs: Sequence[Job], _: argparse.Namespace) -> int:
    """What is not done, unless a process here works through the sweep: that starts again then."""
    if _own(folder) is not None:
        print(told(launch.resume(folder)))
        return 0
    states = [kind_of(job).status(job) for job in runs]
    left = [
        job
        for job, status in zip(runs, states, strict=True)
        if status.state != DONE and not status.is_alive
    ]
    if not left:
        print(f"{folder}: all of its runs are done, or still there")
        return 0
    print(sweep.told(folder, launch.resume_all(left, _is_made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
