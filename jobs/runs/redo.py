"""Which stages an interrupted command with run.redo has already made again."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from jobs.runs.folder import write_json


class RedoJournal:
    """Stages that an interrupted command with run.redo has already made again.

    The same command then continues with the next one instead of starting over.
    """

    def __init__(self, run_dir: Path, command: str) -> None:
        self._path = run_dir / ".redo.json"
        self._command = command
        self.done: list[str] = []
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            before = json.loads(self._path.read_text(encoding="utf-8"))
            self.done = before["done"] if before["command"] == command else []

    def add(self, stage: str) -> None:
        """Note that a stage has been made again."""
        self.done.append(stage)
        write_json(self._path, {"command": self._command, "done": self.done})

    def close(self) -> None:
        """The command is done: the next redo starts afresh."""
        self._path.unlink(missing_ok=True)
