"""Checkpoints of the recovery: taken in a moment, written in the background, whole or absent.

`save` copies what this worker holds to host memory and returns; a thread writes it. Rank 0's thread
waits until every worker's file is there (through the shared folder, so that no message of it mixes
with those of training), commits, renames the folder to `step-<N>` and removes what the retention
policy no longer keeps. A kill at any moment leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.runs.folder import disk_errors
from sparsify.errors import CorruptCheckpointError, TwofourError
from sparsify.files import fsync, write_json
from sparsify.masks.storage import save_masks
from sparsify.training.fragments import Checkpoint, FileFacts, Fragment, commit, write_fragments

MASKS_FILE = "masks.safetensors"

_FACTS = ".facts.json"

_POLL_S = 0.05

_PEERS_TIMEOUT_S = 1800.0

_ASIDE = ".corrupt"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a newer one is whole."""

    num_last: int = 2
    """the newest so many"""
    milestone_every_steps: int | None = None
    """and every one whose step is a multiple of this"""

    def dropped(self, steps: Sequence[int]) -> list[int]:
        """Those of `steps` (ascending) to remove."""
        every = self.milestone_every_steps
        old = steps[: -self.num_last]
        return [step for step in old if not (every and step % every == 0)]


def name_of(step: int) -> str:
    """Folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def finished_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints under `folder`, ascending; none of them looked into."""
    found = folder.glob("step-" + "[0-9]" * 8)
    return sorted(int(path.name.removeprefix("step-")) for path in found)


class Checkpoints:
    """One worker's part in the checkpoints under `folder`; every worker makes one, together.

    Args:
        folder: on a file system that all workers share.
        retention: what rank 0 keeps.
        stage: for messages.
        on_phase: for tests, which interrupt there: called with the name of every phase of a write.
    """

    def __init__(
        self, folder: Path, retention: Retention, stage: str = "distill", *,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._stage = folder, stage
        self._retention = retention
        self._on_phase = on_phase or (lambda phase: None)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if self._rank == 0:
            for left in folder.glob(".step-*.tmp"):
                shutil.rmtree(left)
        # A worker of a killed group may write for a moment longer: its folder carries another
        # token. Nobody has this one before rank 0 has tidied up.
        token = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token, src=0)
        self._token = token[0]

    def save(
        self, step: int, fragments: Sequence[Fragment], masks: Mapping[str, torch.Tensor],
        state: dict[str, Any],
    ) -> float:  # fmt: skip
        """Take a checkpoint after `step` steps; all workers call it with their own fragments.

        Args:
            step: number of optimizer steps done.
            fragments: what this worker holds; copied before this returns.
            masks: keep masks; only rank 0's are used, and they must not change until `wait`.
            state: JSON; only rank 0's is used.

        Returns:
            Seconds that training stood still: the wait for an earlier write, and the copy.

        Raises:
            TwofourError: the earlier checkpoint could not be written.
        """
        begun_s = time.monotonic()
        self.wait()
        kept = self._copied(fragments)
        self._on_phase("copied")
        # The state may grow further while the thread writes it.
        text = json.dumps(state, allow_nan=False) if self._rank == 0 else ""
        work = (step, kept, masks if self._rank == 0 else {}, text)
        self._thread = threading.Thread(target=self._write_guarded, args=work, daemon=True)
        self._thread.start()
        return time.monotonic() - begun_s

    def wait(self) -> None:
        """Until this worker's last write is on the disk; on rank 0, until it is committed.

        Raises:
            TwofourError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what this worker's last write ended with, if it has failed; waits for nothing."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copied(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        kept = []
        on_gpu = False
        for one in fragments:
            buffer = self._buffers.get(one.key)
            if buffer is None or buffer.shape != one.values.shape:
                pin = one.values.is_cuda
                buffer = torch.empty(one.values.shape, dtype=torch.float32, pin_memory=pin)
                self._buffers[one.key] = buffer
            buffer.copy_(one.values, non_blocking=True)
            on_gpu |= one.values.is_cuda
            kept.append(Fragment(one.copy, one.name, one.start, buffer))
        if on_gpu:
            torch.cuda.synchronize()
        return kept

    def _write_guarded(self, step: int, kept: list[Fragment], masks: Any, state: str) -> None:
        try:
            with disk_errors(self._folder):
                self._write(step, kept, masks, state)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, kept: list[Fragment], masks: Any, state: str) -> None:
        partial = self._folder / f".{name_of(step)}.{self._token}.tmp"
        partial.mkdir(exist_ok=True)
        own = f"rank-{self._rank:05d}.safetensors"
        write_fragments(partial / own, kept)
        self._on_phase("written")
        write_json(partial / f"{own}{_FACTS}", asdict(FileFacts.of(partial / own)))
        if self._rank != 0:
            return
        save_masks(partial / MASKS_FILE, masks)
        facts = {MASKS_FILE: FileFacts.of(partial / MASKS_FILE), **self._facts_of_all(partial)}
        self._on_phase("gathered")
        commit(partial, facts, json.loads(state))
        self._on_phase("committed")
        final = self._folder / name_of(step)
        if final.exists():  # the same step again, after a rollback
            shutil.rmtree(final)
        partial.rename(final)
        fsync(self._folder)
        self._on_phase("renamed")
        for old in self._retention.dropped(finished_steps(self._folder)):
            shutil.rmtree(self._folder / name_of(old))
        for aside in self._folder.glob(f"step-*{_ASIDE}"):
            shutil.rmtree(aside)

    def _facts_of_all(self, partial: Path) -> dict[str, FileFacts]:
        """What every worker says of its file, as soon as all have said it."""
        names = [f"rank-{rank:05d}.safetensors" for rank in range(self._world_size)]
        deadline_s = time.monotonic() + _PEERS_TIMEOUT_S
        while missing := [name for name in names if not (partial / f"{name}{_FACTS}").is_file()]:
            if time.monotonic() > deadline_s:
                raise TwofourError(
                    f"{partial}: {missing[0]} did not appear within {_PEERS_TIMEOUT_S:.0f} s; is "
                    "the run's folder on a file system that all nodes share?"
                )
            time.sleep(_POLL_S)
        facts = {}
        for name in names:
            path = partial / f"{name}{_FACTS}"
            facts[name] = FileFacts(**json.loads(path.read_text("utf-8")))
            path.unlink()
        return facts

    def latest(self, warn: Callable[[str], None]) -> tuple[int, Checkpoint] | None:
        """The newest checkpoint that is whole, read through by all workers; all workers call it.

        A checkpoint with a missing, truncated or altered file is set aside, with a warning that
        names the file, and the one before it is tried.

        Returns:
            Number of steps and the opened checkpoint; None if none was ever finished.

        Raises:
            CorruptCheckpointError: there were checkpoints, and none is whole.
        """
        while True:
            steps = finished_steps(self._folder)
            asides = sorted(path.name for path in self._folder.glob(f"step-*{_ASIDE}"))
            # A network file system may show new entries to one node later than to another.
            seen: list[Any] = [steps[-1] if steps else None, asides]
            dist.broadcast_object_list(seen, src=0)
            step, asides = seen
            if step is None and not asides:
                return None
            if step is None:
                raise CorruptCheckpointError(
                    f"{self._folder}: no checkpoint is whole ({', '.join(asides)}); start the "
                    f"stage over with run.redo=[{self._stage}]"
                )
            path = self._folder / name_of(step)
            checkpoint, problem = self._tried(path)
            problems: list[str | None] = [None] * self._world_size
            dist.all_gather_object(problems, problem)
            found = [text for text in problems if text]
            if not found and checkpoint is not None:
                return step, checkpoint
            warn(f"{self._stage}: {found[0]}; going back to the checkpoint before it")
            if self._rank == 0:
                aside = path.with_name(path.name + _ASIDE)
                if aside.exists():
                    shutil.rmtree(aside)
                path.rename(aside)
            dist.barrier()

    def _tried(self, path: Path) -> tuple[Checkpoint | None, str | None]:
        """The checkpoint, and what is wrong with this worker's share of its files."""
        try:
            checkpoint = Checkpoint(path)
            checkpoint.verify(self._rank, self._world_size)
        except CorruptCheckpointError as error:
            return None, str(error)
        return checkpoint, None
