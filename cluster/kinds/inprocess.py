"""The same contract in this process, for debugging and tests: submitting is running to the end."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from cluster.kinds._base import DONE, FAILED, STOPPED, Job, Kind, Status
from cluster.spec import ClusterSpec

LOG, EXIT = "inprocess.log", "inprocess.exit"


class InProcess(Kind):
    """A job that is over when it has been submitted; a debugger stops in it."""

    name = "inprocess"

    def files(self, spec: ClusterSpec, job: Job) -> dict[str, str]:
        """None: the command is all there is to it."""
        return {}

    def submit(self, job: Job) -> str:
        """Run the command's module here, what it prints going to the job's log."""
        argv, directory, code = sys.argv, Path.cwd(), 0
        with (job.folder / LOG).open("a", encoding="utf-8") as log:
            try:
                os.chdir(job.directory)
                sys.argv = [job.command[1], *job.command[2:]]
                with (
                    contextlib.redirect_stdout(log), contextlib.redirect_stderr(log),
                    warnings.catch_warnings(),
                ):  # fmt: skip
                    # The module may be the one that is submitting, and is there already.
                    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
                    runpy.run_module(job.command[1], run_name="__main__", alter_sys=False)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            finally:
                sys.argv = argv
                os.chdir(directory)
        (job.folder / EXIT).write_text(f"{code}\n", encoding="utf-8")
        return str(os.getpid())

    def status(self, job: Job) -> Status:
        """How it ended."""
        code = int((job.folder / EXIT).read_text(encoding="utf-8"))
        state = {0: DONE, os.EX_TEMPFAIL: STOPPED}.get(code, FAILED)
        return Status(state, f"exit code {code}", code)

    def logs(self, job: Job, follow: bool = False) -> Iterator[str]:
        """What it printed."""
        yield from self._file_lines(job.folder / LOG, job, follow)

    def cancel(self, job: Job, now: bool = False) -> str:
        """Nothing to do: it has ended."""
        return f"job {job.id} has ended"

    def hints(self, job: Job) -> list[str]:
        """Where it printed to."""
        return [f"output:    {job.folder / LOG}"]


KIND = InProcess()
