"""The processes of a Ray on this machine: on record while their run lives, and ended after it.

A run that is killed outright cannot end anything. Most of Ray's processes notice by themselves,
some of them late, and its session folder stays. So every run that starts a Ray of its own keeps a
record of its processes, and the next run of the same user clears what a record's dead run has left.
The record is locked while its run lives (the kernel lets go of the lock when the process ends), and
a process is known by its number and the moment it began, so that nothing else can be meant.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil

_LOCK, _PROCESSES = "lock", "processes.json"

_VITAL = ("gcs_server", "raylet")
"""children of a run without which its Ray does nothing more, and may never say so"""

_LOOK_EVERY_S = 0.5

_RECORD_EVERY_S = (1.0, 10.0)
"""while Ray starts, and later: looking through all processes of a machine takes time"""

_STARTED_AFTER_S = 60.0


def began(pid: int) -> int | None:
    """Clock ticks from the machine's start to the process's, None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in ("Z", "X") else int(fields[18])


def kill(pid: int, begun: int) -> bool:
    """Kill the process of this number that began then; whether it was there."""
    try:
        handle = os.pidfd_open(pid)  # held, it cannot come to mean another process
    except (ProcessLookupError, PermissionError):
        return False
    try:
        if began(pid) != begun:
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        return True
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(handle)


def _place() -> list[str]:
    """Where a process's number means the same: this start of the machine, this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return [boot, os.readlink("/proc/self/ns/pid")]


def _lock(path: Path, *, wait: bool) -> IO[str] | None:
    """The file, locked until it is closed; None if another process holds it."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _is_ours(path: Path, *, alone: bool = True) -> bool:
    """Whether a path is a folder of this user, no link, and nobody else may write there."""
    with contextlib.suppress(OSError):
        found = path.lstat()
        is_private = not found.st_mode & 0o022
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        return is_own and (is_private or not alone)
    return False


class LocalRay:
    """Ray as this process starts it: its processes found, recorded, watched and ended.

    Begin before Ray is started, on any thread; children that are there already are none of Ray's.

    Args:
        root: folder of this user's records; None: in the system's folder for temporary files.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.lost: str | None = None
        self._root = root or Path(tempfile.gettempdir()) / f"twofour-{os.getuid()}"
        self._folder = self._root / f"{os.getpid()}-{began(os.getpid())}"
        self._held: IO[str] | None = None
        self._last_words = _LastWords()
        self._others = {child.pid for child in psutil.Process().children()}
        self._known: dict[int, int] = {}
        self._vital: dict[int, tuple[str, int]] = {}
        self.session: Path | None = None
        self._session_word = re.compile(rf"(/[^\n=]*/session_[^/\n]*_{os.getpid()})(?:/|$)", re.M)
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="Ray's processes", daemon=True)

    def begin(self) -> str:
        """Clear what dead runs have left, and begin to watch; one line of what was cleared, or ''.

        A folder for records that cannot be had, or is not this user's alone, costs the record.
        """
        said = ""
        with contextlib.suppress(OSError):
            self._root.mkdir(mode=0o700, exist_ok=True)
            if _is_ours(self._root):
                with _all_records(self._root):
                    said = clear_dead(self._root)
                    self._folder.mkdir(exist_ok=True)
                    self._held = _lock(self._folder / _LOCK, wait=False)
        self._thread.start()
        return said

    def check(self) -> str | None:
        """What Ray has lost, looked at now, in one line; None while it lives."""
        for pid, (_, begun) in list(self._vital.items()):
            if began(pid) != begun and not self._stop.is_set():
                self.lost = self._words(pid)
        return self.lost

    def _words(self, pid: int) -> str:
        name, _ = self._vital[pid]
        logs = "Ray's logs" if self.session is None else self.session / "logs"
        return (
            f"Ray's {name} (process {pid}) on this machine has died, as happens when memory runs "
            f"out, or at its start where a machine is too busy; see {logs}; run the same command "
            "again to continue"
        )

    def is_ending(self) -> None:
        """Watch no more: from here on Ray's processes end because they are asked to.

        A Ray that was lost may still end this process before it has said so: `has_spoken` then.
        """
        self._stop.set()
        if self.lost is None:
            self.has_spoken()

    def has_spoken(self) -> None:
        """This process has said why it ends: nothing is left for the program beside it."""
        self._last_words.end()

    def look(self) -> None:
        """Find the processes of Ray, record them, and have their death said whatever happens."""
        self._look()
        self._last_words.tell({pid: self._words(pid) for pid in self._vital})

    def end(self, *, keep_folder: bool) -> None:
        """Kill what is left of Ray, take back the record and, unless kept, the session's folder."""
        self.is_ending()
        self._look()
        for pid, begun in self._known.items():
            kill(pid, begun)
        if self.session is not None and not keep_folder:
            _remove_session(self.session)
        if self._held is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._held.close()

    def _watch(self) -> None:
        begun_s = recorded_s = time.monotonic()
        while not self._stop.wait(_LOOK_EVERY_S):
            now_s = time.monotonic()
            every_s = _RECORD_EVERY_S[now_s - begun_s > _STARTED_AFTER_S]
            if now_s - recorded_s >= every_s:
                recorded_s = now_s
                self.look()
            self.check()

    def _look(self) -> None:
        """Find the processes of Ray and record them."""
        with self._mutex:
            known = {pid: begun for pid, begun in self._known.items() if began(pid) == begun}
            roots = [c for c in psutil.Process().children() if c.pid not in self._others]
            for root in roots:
                with contextlib.suppress(psutil.Error):
                    for process in (root, *root.children(recursive=True)):
                        if (begun := began(process.pid)) is not None:
                            known[process.pid] = begun
                    if root.pid in known and root.name() in _VITAL:
                        self._vital[root.pid] = (root.name(), known[root.pid])
                    # As soon as one of them runs: a run may be killed before Ray has said it.
                    if found := self._session_word.search("\n".join(root.cmdline())):
                        self.session = Path(found[1])
            self._known = known
            if self._held is not None:
                self._record()

    def _record(self) -> None:
        content = {
            "place": _place(), "processes": list(self._known.items()),
            "session": None if self.session is None else str(self.session),
        }  # fmt: skip
        temporary = self._folder / f".{_PROCESSES}"
        with contextlib.suppress(OSError):  # a full disk costs the record, not the run
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self._folder / _PROCESSES)


class _LastWords:
    """The program `last_words` beside this process; without it the run goes on."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("last_words.py")
        self._mutex = threading.Lock()
        self._said: dict[int, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(  # noqa: S603 -- our own program
                [sys.executable, "-I", "-S", str(program)], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def tell(self, words: dict[int, str]) -> None:
        """What to say when a process of these numbers dies."""
        if words != self._said:
            self._said = words
            self._write(json.dumps(words).encode() + b"\n")

    def end(self) -> None:
        """This process speaks for itself from here on."""
        self._write(b"\n")
        with self._mutex:
            if self._process is not None and self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
                self._process.wait()
                self._process = None

    def _write(self, line: bytes) -> None:
        with self._mutex, contextlib.suppress(OSError):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()


@contextlib.contextmanager
def _all_records(root: Path) -> Iterator[None]:
    """Alone with the records: none is half made."""
    with _lock(root / _LOCK, wait=True) or contextlib.nullcontext():
        yield


def clear_dead(root: Path) -> str:
    """Clear what dead runs have left, by their records; one line of it, '' if there was nothing.

    The caller is alone with the records (`_all_records`).
    """
    num_processes = num_folders = 0
    for folder in root.iterdir():
        if not _is_ours(folder) or (held := _lock(folder / _LOCK, wait=False)) is None:
            continue
        with held:
            try:
                content: dict[str, Any] = json.loads((folder / _PROCESSES).read_text("utf-8"))
            except (OSError, ValueError):  # killed before the first record
                content = {"place": None, "processes": [], "session": None}
            if content["place"] == _place():
                num_processes += sum(kill(*process) for process in content["processes"])
            if content["session"] is not None:
                num_folders += _remove_session(Path(content["session"]))
            shutil.rmtree(folder, ignore_errors=True)
    if not num_processes and not num_folders:
        return ""
    return (
        f"cleared what a run that was killed had left of its Ray: {num_processes} processes, "
        f"{num_folders} folders of logs"
    )


def _remove_session(session: Path) -> bool:
    """Remove a session folder of Ray, and the link to the latest one if that is it."""
    if not session.name.startswith("session_") or not _is_ours(session, alone=False):
        return False
    latest = session.parent / "session_latest"
    with contextlib.suppress(OSError):
        if os.readlink(latest) == str(session):
            latest.unlink()
    shutil.rmtree(session, ignore_errors=True)
    return not session.exists()
