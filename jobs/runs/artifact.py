"""A stage's result on disk: whole or absent, with a record that says what made it.

A stage works in `<run>/.<stage>.partial/` and its folder appears under its own name by one rename,
after every file has reached the disk. `record.json` inside holds the stage's identity (the part of
the config and the fingerprints of the inputs that decide the result), the files with size and
SHA-256, metrics, versions, command and time. A later run of the same identity reuses it; another
identity is refused with the fields that differ, unless the user asked to redo the stage.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from jobs.runs.folder import disk_errors, read_json, write_json
from sparsify.errors import InputError
from sparsify.files import file_sha256, fsync

RECORD = "record.json"

SCHEMA = 1

_KEYS: dict[str, type | tuple[type, ...]] = {
    "identity": dict, "outputs": dict, "metrics": dict, "duration_s": (int, float),
}  # fmt: skip
"""What a record must have for others to read it"""

_VERSIONED = (
    "torch", "transformers", "safetensors", "tokenizers", "ray", "deepspeed", "hydra-core", "wandb",
)  # fmt: skip


Other = Literal["refuse", "replace", "keep"]
"""what becomes of an interrupted stage of another identity: it is in the way, it is thrown away, or
it is kept, where everything in it lies under what decided it"""


@dataclass
class Artifact:
    """A finished stage."""

    folder: Path
    record: dict[str, Any]
    is_reused: bool


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for name in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished stage.

    Raises:
        InputError: missing, or not whole.
    """
    path = folder / RECORD
    try:
        record = read_json(path, _redo(folder))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: has no {RECORD}, so it is not a finished stage; {_redo(folder)}"
        ) from None
    if record.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: schema {record.get('schema')}, this version reads {SCHEMA}; {_redo(folder)}"
        )
    for key, kind in _KEYS.items():
        if not isinstance(record.get(key), kind):
            state = "is no such value" if key in record else "is missing"
            raise InputError(f"{path}: damaged, {key!r} {state}; {_redo(folder)}")
    for name, facts in record["outputs"].items():
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= set(facts):
            raise InputError(f"{path}: damaged, nothing is said of {name!r}; {_redo(folder)}")
    return record


def _redo(folder: Path) -> str:
    """What to do about a damaged stage."""
    return f"the stage is damaged, add run.redo=[{folder.name}] to the command that made it"


def read_whole(folder: Path) -> dict[str, Any]:
    """`read_record`, and every file that it names is there with its size; contents are not read.

    Raises:
        InputError: the record is not whole, or a file is not.
    """
    record = read_record(folder)
    for name, facts in record["outputs"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            state = "is missing" if not path.is_file() else "has another size"
            raise InputError(f"{path}: {state}; {_redo(folder)}")
    return record


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`field: old -> new` for every leaf in which two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            place = f"{prefix}.{key}" if prefix else str(key)
            lines += differences(old.get(key, "absent"), new.get(key, "absent"), place)
        return lines
    return [] if old == new else [f"{prefix}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_hash else text


def _refuse(run_dir: Path, stage: str, changes: list[str], what: str) -> InputError:
    return InputError(
        f"{run_dir.name}: {what} {stage} was made from something else ({'; '.join(changes)}); use "
        f"another run.dir=, go back to the old values, or add run.redo=[{stage}]"
    )


def find_finished(
    run_dir: Path, stage: str, identity: dict[str, Any], may_extend: bool, may_follow: bool
) -> Artifact | None:
    """The finished stage of this identity, or None when there is none yet.

    Args:
        run_dir: the run's folder.
        stage: its name.
        identity: what decides the result; plain JSON values.
        may_extend: inputs that the old result did not have are no conflict, only a reason to run
            again (a table that gets another row).
        may_follow: an earlier stage was made again by this command, so that changed inputs are what
            the user asked for and the stage is made again from them.

    Raises:
        InputError: the stage was made from something else, or its files are damaged.
    """
    folder = run_dir / stage
    if not folder.is_dir():
        return None
    record = read_record(folder)
    changes = differences(record["identity"], identity)
    if changes:
        is_of_inputs = all(change.startswith("inputs.") for change in changes)
        if may_follow and is_of_inputs:
            return None
        if may_extend and is_of_inputs and all(": absent -> " in change for change in changes):
            return None
        raise _refuse(run_dir, stage, changes, "the finished stage")
    for name, facts in read_whole(folder)["outputs"].items():
        if file_sha256(folder / name) != facts["sha256"]:
            raise InputError(
                f"{folder / name}: its SHA-256 changed since it was written; {_redo(folder)}"
            )
    return Artifact(folder, record, is_reused=True)


class StageWriter:
    """The partial folder of a stage that is being made.

    Attributes:
        identity: what decides the stage's result.
        folder: where the stage writes; becomes the stage's folder at `commit`.
        scratch: beside it, for what must survive an interruption but is no result.
        train_storage: beside it, for Ray Train's own files.
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        identity: dict[str, Any],
        command: str,
        redo: bool = False,
        other: Other = "refuse",
    ) -> None:
        """Begin, or go on.

        Args:
            run_dir: the run's folder.
            stage: its name.
            identity: what decides its result; plain JSON values.
            command: for the record.
            redo: make it again, whatever there is of it.
            other: what becomes of what an interruption left that was made from something else.

        Raises:
            InputError: there is such, and it is to be refused.
        """
        self._run_dir = run_dir
        self._stage = stage
        self.identity = identity
        self._command = command
        self._started_at_s = time.time()
        partial = run_dir / f".{stage}.partial"
        self._clean_up_interrupted(partial, redo, other)
        self.folder = partial / "result"
        self.scratch = partial / "scratch"
        self.train_storage = partial / "train"
        with disk_errors(partial):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            self.scratch.mkdir(exist_ok=True)
            write_json(partial / "begun.json", {"identity": identity, "redo": redo})

    def _clean_up_interrupted(self, partial: Path, redo: bool, other: Other) -> None:
        """Keep an interrupted stage of the same identity, throw another away only when asked to.

        A redo that was interrupted is continued by the next one of the same identity.
        """
        scratch = partial / "scratch"
        is_begun = scratch.is_dir() and any(scratch.iterdir())
        try:
            begun = read_json(partial / "begun.json", f"add run.redo=[{self._stage}] to start over")
        except FileNotFoundError:
            begun = {}
        except InputError:
            if is_begun and not redo and other == "refuse":
                raise  # hours of work, and nothing says of what
            begun = {}
        changes = differences(begun.get("identity"), self.identity)
        if (not changes or other == "keep") and (begun.get("redo") or not redo):
            return
        if partial.exists() and (redo or other == "replace" or not begun):
            shutil.rmtree(partial)
        elif is_begun:
            raise _refuse(self._run_dir, self._stage, changes, "the interrupted stage")

    def commit(self, metrics: dict[str, Any], seed: int) -> Artifact:
        """Write the record, flush everything to the disk and give the folder its name."""
        outputs = {}
        with disk_errors(self.folder):
            for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
                fsync(path)
                name = path.relative_to(self.folder).as_posix()
                outputs[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            record = {
                "schema": SCHEMA,
                "stage": self._stage,
                "identity": self.identity,
                "outputs": outputs,
                "metrics": metrics,
                "seed": seed,
                "versions": versions(),
                "command": self._command,
                "started_at_s": round(self._started_at_s, 3),
                "duration_s": round(time.time() - self._started_at_s, 3),
            }
            write_json(self.folder / RECORD, record)
            for folder in {p.parent for p in self.folder.rglob("*")}:
                fsync(folder)
            final = self._run_dir / self._stage
            replaced = self._run_dir / f".{self._stage}.replaced"
            if replaced.exists():
                shutil.rmtree(replaced)
            if final.exists():
                final.rename(replaced)
            self.folder.rename(final)
            fsync(self._run_dir)
        for left in (replaced, self.folder.parent):
            if left.exists():
                shutil.rmtree(left)
        return Artifact(final, record, is_reused=False)
