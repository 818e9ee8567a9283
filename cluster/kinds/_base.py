"""What every kind of cluster can do with a command, and what it is told of one."""

from __future__ import annotations

import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ClusterError
from cluster.spec import ClusterSpec

WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"

ALIVE = (WAITING, RUNNING)

_POLL_S = 2.0


@dataclass(frozen=True)
class Job:
    """A command to be run elsewhere; all of it is text, so that it can be kept as JSON."""

    kind: str
    """name of the kind of cluster"""
    name: str
    """shown in queues and dashboards: the run's"""
    command: tuple[str, ...]
    """words after `python`: -m, the module, where its resolved options are"""
    typed: str
    """the command line that a person typed"""
    root: str
    """absolute path of the project's packages"""
    directory: str
    """absolute path that the options' relative ones start from"""
    run_dir: str
    """absolute path of what the command makes"""
    id: str = ""
    """the scheduler's name for it, '' before it is submitted"""
    array: str = ""
    """absolute path of the script that starts it as one of several, '' for a job of its own"""
    task: str = ""
    """its number among those of the array"""
    script: str = "job.sh"
    """name of the file that a scheduler of scripts gets"""
    after: str = ""
    """id of the job that has to end well before this one starts"""
    parts: tuple[tuple[str, ...], ...] = ()
    """stages that each of several jobs does, one after another; () for a single job"""

    @property
    def folder(self) -> Path:
        """What the job itself needs and leaves: script, options, logs; for its owner alone."""
        return Path(self.run_dir) / ".cluster"


@dataclass(frozen=True)
class Array:
    """Jobs that are handed over as one."""

    script: str
    """text of the file `array` of its jobs"""
    link: str
    """name under which each job has that file in its own folder too"""
    jobs: tuple[Job, ...]
    """each with `array` and `task`"""


@dataclass(frozen=True)
class Status:
    """Where a job is."""

    state: str
    """waiting, running, done, failed or stopped"""
    detail: str = ""
    """the scheduler's own word for it, where it runs, why it waits; on one line"""
    exit_code: int | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it may still do something."""
        return self.state in ALIVE


class Kind(ABC):
    """One way to run a command elsewhere."""

    name: str
    follows = False
    """whether a command that is submitted shows what its job prints, until that ends"""
    chains = False
    """whether a job may wait for another, so that stages can have allocations of their own"""

    @abstractmethod
    def files(self, spec: ClusterSpec, job: Job) -> dict[str, str]:
        """Name -> text of what goes into the job's folder: all that will be submitted.

        Raises:
            ClusterError: it cannot be said to the scheduler.
        """

    @abstractmethod
    def submit(self, job: Job) -> str:
        """Hand the job, whose files are written, to the scheduler; its id.

        Raises:
            ClusterError: it is refused, or there is no such scheduler here.
        """

    def arrays(self, sweep: Job, runs: Sequence[tuple[ClusterSpec, Job]]) -> list[Array]:
        """The runs of a sweep as arrays, as few as can be; none where the scheduler has no arrays.

        Args:
            sweep: its name, its folder and what was typed.
            runs: in the order in which they are to start.

        Raises:
            ClusterError: they cannot be said to the scheduler.
        """
        return []

    def submit_array(self, jobs: Sequence[Job]) -> list[str]:
        """Hand over jobs of one array, whose files are written; their ids.

        Raises:
            ClusterError: as `submit`; none of them is there then.
        """
        raise ClusterError(f"cluster.kind={self.name} has no arrays")

    @abstractmethod
    def status(self, job: Job) -> Status:
        """Where the job is now.

        Raises:
            ClusterError: the scheduler cannot be asked.
        """

    @abstractmethod
    def logs(self, job: Job, follow: bool = False) -> Iterator[str]:
        """What the job has printed, line by line; with `follow` on, until it ends."""

    @abstractmethod
    def cancel(self, job: Job, now: bool = False) -> str:
        """Ask the job to save and stop, or end it `now`; one line that says what will happen."""

    @abstractmethod
    def hints(self, job: Job) -> list[str]:
        """How to reach it, for a person who has just submitted it."""

    def attach(self, job: Job, say: Callable[[str], None], ask: Callable[[str], bool]) -> Status:
        """Show what the job prints until it ends; where it is then.

        Ctrl-C does not end the job: a question is asked first, and without a yes it goes on.
        """
        try:
            for line in self.logs(job, follow=True):
                say(line)
        except KeyboardInterrupt:
            if ask(f"cancel job {job.id}?"):
                say(self.cancel(job))
            else:
                say(f"job {job.id} goes on: python -m jobs.manage logs {job.run_dir} --follow")
        return self.status(job)

    def _file_lines(self, path: Path, job: Job, follow: bool) -> Iterator[str]:
        """Lines of a log on a disk that is seen here too."""
        place, rest = 0, b""
        while True:
            is_last = not follow or not self.status(job).is_alive
            if path.is_file():
                with path.open("rb") as file:
                    file.seek(place)
                    *lines, rest = (rest + file.read()).split(b"\n")
                    place = file.tell()
                for line in lines:
                    yield line.decode(errors="replace")
            if is_last:
                if rest:
                    yield rest.decode(errors="replace")
                return
            time.sleep(_POLL_S)


def call(words: list[str], doing: str, timeout_s: float = 60.0, stdin: str | None = None) -> str:
    """What a scheduler's command prints.

    Raises:
        ClusterError: it is not here, does not answer, or refuses; in one line with its own words.
    """
    try:
        done = subprocess.run(  # words of ours, no shell  # noqa: S603
            words, capture_output=True, text=True, timeout=timeout_s, check=False, input=stdin
        )
    except FileNotFoundError:
        raise ClusterError(f"{doing}: there is no {words[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{doing}: {words[0]} did not answer for {timeout_s:g} s") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        said = said.replace(f"{words[0]}: ", "").removeprefix("error: ")
        raise ClusterError(f"{doing}: {words[0]}: {said}")
    return done.stdout.strip()
