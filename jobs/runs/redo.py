"""Which stages an interrupted command with run.redo has already made again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from jobs.runs.folder import read_json, write_json


class RedoJournal:
    """Stages that an interrupted command with run.redo has already made again.

    The same command then continues with the next one instead of starting over.
    """

    def __init__(self, run_dir: Path, command: str) -> None:
        self._path = run_dir / ".redo.json"
        self._command = command
        self.done: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            before = read_json(self._path, "remove it, and stages are made again that were")
            self.done = before.get("done", []) if before.get("command") == command else []

    def left(self, redo: Sequence[str], stages: Sequence[str]) -> set[str]:
        """Stages of a command with this run.redo that are yet to be made again."""
        asked = stages if "all" in redo else redo
        return set(asked) - set(self.done)

    def add(self, stage: str) -> None:
        """Note that a stage has been made again."""
        self.done.append(stage)
        write_json(self._path, {"command": self._command, "done": self.done})

    def close(self) -> None:
        """The command is done: the next redo starts afresh."""
        self._path.unlink(missing_ok=True)
