"""The commands as a user runs them, each in a process of its own that starts warm.

`python -m jobs.prune` spends six seconds of a core on importing torch, transformers and Ray before
it reads its first option. Here a server imports them once and forks a process per command; what
the process then does is what the interpreter does with `-m`: its arguments, environment, folder,
streams, signals and exit code are a command's own.
"""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.integration.recoveries import warm_context


def _as_main(
    job: str, words: tuple[str, ...], environment: dict[str, str], folder: str, out: str, err: str
) -> None:
    """In the forked process: become `python -m jobs.<job> words...` and end as it would."""
    os.setsid()
    for number, path in ((1, out), (2, err)):
        target = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [f"jobs.{job}", *words]
    code: Any = 0
    try:
        runpy.run_module(f"jobs.{job}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


class Command:
    """`python -m jobs.<job> words...`, started; the parts of `subprocess.Popen` that tests use.

    Args:
        job: the module below `jobs`.
        words: flags and overrides.
        environment: all of it.
        folder: where it runs.
    """

    def __init__(self, job: str, *words: str, environment: dict[str, str], folder: Path) -> None:
        self.args = [sys.executable, "-m", f"jobs.{job}", *words]
        self._folder = tempfile.TemporaryDirectory(prefix=f"{job}-")  # goes with this object
        self._streams = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for path in self._streams:
            path.touch()
        self._process = warm_context().Process(
            target=_as_main,
            args=(job, words, environment, str(folder), *map(str, self._streams)),
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code (minus the signal's number), None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it had to be killed.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, *self.said())
        return self._process.exitcode

    def said(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        out, err = (path.read_text(encoding="utf-8") for path in self._streams)
        return out, err

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it said."""
        self.wait(timeout)
        return self.said()

    def finished(self, timeout: float) -> subprocess.CompletedProcess:
        """Wait for its end, as `subprocess.run` does."""
        code = self.wait(timeout)
        return subprocess.CompletedProcess(self.args, code, *self.said())


def wait_until(ready: Any, command: Command, timeout_s: float = 600.0) -> None:
    """Wait for a moment in the life of a command, which must be alive until then."""
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        assert command.poll() is None, f"ended before that: {chr(10).join(command.said())}"
        assert time.monotonic() < deadline_s, "the moment never came"
        time.sleep(0.02)
