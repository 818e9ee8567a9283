"""Which stages an interrupted command with run.redo has already made again."""

from __future__ import annotations
import contextlib
import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from jobs.runs.folder import write_json
from conf.schema import Config, default_run_dir, to_dict
from jobs.runs import artifact as _artifact, folder as folder_module, context as _stage, models as models_module
from sparsify import errors
from sparsify.errors import InputError, TwofourError
if TYPE_CHECKING:
    from cluster.runtime.backend import RayCluster
    from jobs.runs.artifact import Artifact
    from jobs.runs.display import Display

class RedoJournal:
    """Stages that an interrupted command with run.redo has already made again.

    The same command then goes on with the next one instead of starting over.
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
