"""Memory of a command and every process it starts, and a limit that the kernel holds it to.

Linux only: figures are those of the kernel. A process belongs to the command if it carries a mark
in its environment, which children inherit even when they detach themselves, or if its parent
belongs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sparsify.errors import InputError

_MARK = "TWOFOUR_BENCH_MARK"

_POLL_S = 0.25

PROC = Path("/proc")


@dataclass
class MemoryUse:
    """Memory of a group of processes, in bytes; pages that they share count once."""

    anonymous: int = 0
    """heap, stacks and whatever else comes from no file"""
    shared: int = 0
    """shared memory, such as an object store"""
    file: int = 0
    """pages of mapped files, which the kernel takes back when it needs them"""
    by_command: dict[str, int] = field(default_factory=dict)
    """anonymous and shared memory by name of the program"""

    @property
    def held(self) -> int:
        """What cannot be taken back: anonymous and shared."""
        return self.anonymous + self.shared


@dataclass
class Finished:
    """A command that has ended."""

    returncode: int
    seconds: float
    peak: MemoryUse
    """at the moment when most was held"""
    peak_file: int
    """most pages of mapped files at any moment"""
    num_kills: int | None
    """processes that the kernel killed at the limit; None: it was not asked to hold one"""


def run_logged(words: list[str], log: Path, environment: dict[str, str] | None = None) -> int:
    """Run a command to its end with its output in a file; the exit code.

    Args:
        words: the command.
        log: file for what it prints.
        environment: variables to set on top of this process's own.
    """
    with log.open("wb") as output:
        done = subprocess.run(  # a command that this package put together  # noqa: S603
            words, stdout=output, stderr=subprocess.STDOUT, check=False,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
    return done.returncode


def run_watched(
    command: list[str], log: Path, limit_bytes: int | None, is_enforced: bool
) -> Finished:
    """Run a command to its end and watch the memory of its processes, four times a second.

    Args:
        command: words of the command; it runs in this process's folder and environment.
        log: file for its output.
        limit_bytes: for `is_enforced`.
        is_enforced: also have the kernel hold all processes together to the limit, in a control
            group below this process's own.

    Raises:
        InputError: a control group cannot be made here.
    """
    mark = secrets.token_hex(8)
    environment = {**os.environ, _MARK: mark}
    peak, peak_file = MemoryUse(), 0
    started_s = time.monotonic()
    group = control_group(limit_bytes) if is_enforced and limit_bytes else None
    with group or contextlib.nullcontext() as folder, log.open("wb") as output:
        words = list(command)
        if folder is not None:
            # The shell moves itself in before it becomes the command, so nothing escapes.
            enter = f"echo $$ > '{folder}/cgroup.procs' && exec \"$@\""
            words = ["/bin/sh", "-c", enter, "sh", *command]
        child = subprocess.Popen(  # a command that this package put together  # noqa: S603
            words, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while child.poll() is None:
                use = memory_of(mark)
                peak = use if use.held > peak.held else peak
                peak_file = max(peak_file, use.file)
                time.sleep(_POLL_S)
        except BaseException:
            child.terminate()
            child.wait()
            raise
        kills = None if folder is None else num_kills(folder)
    return Finished(child.returncode, time.monotonic() - started_s, peak, peak_file, kills)


def memory_of(mark: str) -> MemoryUse:
    """Memory of all processes that carry `mark` or descend from one that does, now."""
    use = MemoryUse()
    for process in _marked(mark):
        try:
            # psutil gives no shares of shared pages by kind; the kernel does.
            rollup = PROC / str(process.pid) / "smaps_rollup"
            figures = _rollup(rollup.read_text(encoding="utf-8"))
        except OSError:  # it ended meanwhile
            continue
        name = process.info["name"]
        anonymous, shared = figures.get("Pss_Anon", 0), figures.get("Pss_Shmem", 0)
        use.anonymous += anonymous
        use.shared += shared
        use.file += figures.get("Pss_File", 0)
        use.by_command[name] = use.by_command.get(name, 0) + anonymous + shared
    return use


def _marked(mark: str) -> list[psutil.Process]:
    """The processes that belong to the mark.

    Ray's workers write their title over their environment, so their parent is looked at too.
    """
    found = list(psutil.process_iter(["environ", "name", "ppid"]))  # None: another user's
    belonging = {p.pid for p in found if (p.info["environ"] or {}).get(_MARK) == mark}
    while children := {p.pid for p in found if p.info["ppid"] in belonging} - belonging:
        belonging |= children
    return [process for process in found if process.pid in belonging]


def _rollup(text: str) -> dict[str, int]:
    """Field -> bytes of a smaps_rollup file; Pss gives each sharer its part of a shared page."""
    figures = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            figures[words[0].rstrip(":")] = int(words[1]) * 1024
    return figures


@contextlib.contextmanager
def control_group(limit_bytes: int, membership: Path = PROC / "self" / "cgroup") -> Iterator[Path]:
    """A control group with a memory limit below this process's own; removed at the end.

    Raises:
        InputError: there is no memory controller, or it cannot be written.
    """
    own, is_v2 = own_memory_group(membership.read_text(encoding="utf-8"))
    folder = own / f"twofour-bench-{os.getpid()}"
    try:
        folder.mkdir()
        limit, swap = (
            ("memory.max", "memory.swap.max")
            if is_v2
            else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        )
        (folder / limit).write_text(str(limit_bytes), encoding="utf-8")
        if (folder / swap).exists():
            (folder / swap).write_text("0" if is_v2 else str(limit_bytes), encoding="utf-8")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise InputError(
            f"{folder}: no control group with a memory limit can be made ({error}); it takes root "
            "and a writable /sys/fs/cgroup; leave out --enforce to measure without one"
        ) from None
    try:
        yield folder
    finally:
        for _ in range(50):  # processes that were just ended may still be in it
            with contextlib.suppress(OSError):
                folder.rmdir()
            if not folder.exists():
                break
            time.sleep(0.1)


def own_memory_group(membership: str, root: Path = Path("/sys/fs/cgroup")) -> tuple[Path, bool]:
    """Folder of the memory group that /proc/self/cgroup names, and whether it is version 2."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return root / "memory" / path.lstrip("/"), False
    for line in membership.splitlines():
        if line.startswith("0::"):
            return root / line[3:].lstrip("/"), True
    raise InputError("/proc/self/cgroup names no memory group; leave out --enforce")


def num_kills(folder: Path) -> int:
    """Processes of a control group that the kernel killed because of the limit."""
    for name in ("memory.events", "memory.oom_control"):
        if (folder / name).exists():
            for line in (folder / name).read_text(encoding="utf-8").splitlines():
                words = line.split()
                if words[0] == "oom_kill":
                    return int(words[1])
    return 0
