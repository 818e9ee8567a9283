"""This machine: the command as a process of its own, which goes on when the terminal closes.

A command with cluster.kind=local is not submitted at all: it works where it was typed, and only
leaves its record. `jobs.manage resume` brings it back through here.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ClusterError
from cluster.kinds._base import DONE, FAILED, RUNNING, STOPPED, Job, Kind, Status, call
from cluster.spec import ClusterSpec

LOG, EXIT = "local.log", "local.exit"

_AT_TERMINAL = "terminal"

_INTERRUPTED = 128 + signal.SIGINT

# Leaves its exit code behind, however the command ends.
_WATCHED = 'code=0; "$@" || code=$?; echo "$code" >"$0.new"; mv "$0.new" "$0"'


class Local(Kind):
    """Processes of this machine."""

    name = "local"

    def files(self, spec: ClusterSpec, job: Job) -> dict[str, str]:
        """None: the command is all there is to it."""
        return {}

    def submit(self, job: Job) -> str:
        """Start the process; HOST:PID:START TIME."""
        (job.folder / EXIT).unlink(missing_ok=True)
        environment = {**os.environ, "PYTHONPATH": job.root, "TWOFOUR_SUBMITTED": self.name}
        log = os.open(job.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = subprocess.Popen(  # words of ours, no shell in them  # noqa: S603
                ["/bin/sh", "-c", _WATCHED, str(job.folder / EXIT), sys.executable, *job.command],
                cwd=job.directory, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ClusterError(f"{job.name} cannot be started: {error.strerror}") from None
        finally:
            os.close(log)
        return process_id(process.pid)

    def status(self, job: Job) -> Status:
        """Whether the process is there, and the exit code that it left."""
        host, pid, started = job.id.split(":")[:3]
        if host != socket.gethostname():
            raise ClusterError(f"job {job.id}: runs on {host}; ask there")
        is_there = _started(int(pid)) == started  # asked first: the code is the last it leaves
        try:
            code = int((job.folder / EXIT).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            if is_there:
                return Status(RUNNING, f"process {pid}")
            if _AT_TERMINAL in job.id:
                return Status(STOPPED, "its process has ended, and has not said how")
            return Status(FAILED, "its process was killed")
        state = {0: DONE, os.EX_TEMPFAIL: STOPPED, _INTERRUPTED: STOPPED}.get(code, FAILED)
        return Status(state, f"exit code {code}", code)

    def logs(self, job: Job, follow: bool = False) -> Iterator[str]:
        """Lines of the process; those of a command at a terminal are on that terminal."""
        if _AT_TERMINAL in job.id:
            raise ClusterError(
                f"{job.run_dir}: was started at a terminal, which has what it printed; "
                f"what it measured is in {Path(job.run_dir) / 'metrics.jsonl'}"
            )
        yield from self._file_lines(job.folder / LOG, job, follow)

    def cancel(self, job: Job, now: bool = False) -> str:
        """SIGTERM to the command: it saves and stops; `now`, SIGKILL to all of its session."""
        if not self.status(job).is_alive:
            return f"{job.run_dir}: nothing is running"
        pid = int(job.id.split(":")[1])
        if now and os.getsid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
            return f"process {pid} and those it started are ended"
        # Of a job in the background the first process is the shell that waits for the command.
        for target in _children(pid) if os.getsid(pid) == pid else [pid]:
            os.kill(target, signal.SIGKILL if now else signal.SIGTERM)
        return f"process {pid} was asked to save and stop" if not now else f"process {pid} is ended"

    def hints(self, job: Job) -> list[str]:
        """Where it prints to."""
        return [f"follow:    tail -F {shlex.quote(str(job.folder / LOG))}"]


def process_id(pid: int, at_terminal: bool = False) -> str:
    """A name for a process that no later process has: host, pid, start time."""
    deadline = time.monotonic() + 5
    while not (started := _started(pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    words = [socket.gethostname(), str(pid), started, *([_AT_TERMINAL] if at_terminal else [])]
    return ":".join(words)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name of this machine's GPUs: those that it names, or all."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name for name in told.split(",") if name]
    try:
        said = call(["nvidia-smi", "--list-gpus"], "cannot count the GPUs")
    except ClusterError:
        return []
    return [str(number) for number in range(len(re.findall(r"(?m)^GPU \d+:", said)))]


def leave_code(job: Job, code: int | None) -> None:
    """Keep how a command at a terminal has ended; None: it has not."""
    path = job.folder / EXIT
    path.unlink(missing_ok=True)
    if code is not None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{code}\n")


def _started(pid: int) -> str:
    """When a process was started, in ticks since the machine was; '' when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def _children(pid: int) -> list[int]:
    """Processes that a process has started itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == pid:
            found.append(int(path.parent.name))
    return found


KIND = Local()
