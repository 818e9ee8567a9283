"""Safetensors files that are whole or absent, and shards of a model that is written as it comes."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify.files import fsync, written_whole

METADATA = {"format": "pt"}
"""of a model's weight files: one key, for several would be written in no fixed order"""


def tensor_names(file: safe_open) -> list[str]:
    """Names in an open safetensors file, which is no mapping though it has keys."""
    return list(file.keys())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all; the same tensors give the same bytes."""
    # safetensors writes to `.tmpXXXXXX` beside the file it is told, which a kill would leave there,
    # and lets nobody but its owner read it: others serve and evaluate what a job has written.
    with written_whole(path, in_folder=True) as temporary:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(mode)


class Shards:
    """Writes a model's weight files as its tensors come: at most a shard of them is in memory.

    The same tensors in the same order give the same bytes.

    Args:
        folder: made if it is not there.
        shard_bytes: a file holds at most so much, or what one `add` was given.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._num_bytes = 0
        self.total_bytes = 0
        """of the tensors that were added"""
        self._written: list[tuple[Path, list[str]]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, which stay in one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._held and self._num_bytes + size > self._shard_bytes:
            self._flush()
        for name, tensor in tensors.items():
            held = tensor.detach().cpu().contiguous()
            if held.untyped_storage().nbytes() != held.nbytes:
                held = held.clone()  # safetensors refuses views of shared memory
            self._held[name] = held
        self._num_bytes += size
        self.total_bytes += size

    def finish(self) -> dict[str, str]:
        """Give the files their names; returns tensor -> file.

        Weight files that were in the folder before are removed.
        """
        self._flush()
        for path in self._folder.glob("model*.safetensors"):
            path.unlink()
        found: dict[str, str] = {}
        for number, (path, names) in enumerate(self._written, 1):
            file = f"model-{number:05d}-of-{len(self._written):05d}.safetensors"
            path.replace(self._folder / file)
            found.update(dict.fromkeys(names, file))
        fsync(self._folder)
        return found

    def _flush(self) -> None:
        path = self._folder / f".shard-{len(self._written) + 1:05d}.safetensors"
        write_tensors(path, self._held, METADATA)
        self._written.append((path, list(self._held)))
        self._held, self._num_bytes = {}, 0
