"""Writes a packed folder tensor by tensor: at most a shard of it is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.errors import InputError
from sparsify.packed.folder import INDEX, tensor_sha256, write_index
from sparsify.tensors import Shards

GIGABYTE = 10**9


class PackedWriter:
    """Collects tensors into shards; `finish` writes the index, and with it the folder is one.

    Args:
        folder: made if it is not there.
        shard_bytes: a file holds at most so much, or one layer.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._shards = Shards(folder, shard_bytes)
        self._folder = folder
        self._hashes: dict[str, str] = {}
        (folder / INDEX).unlink(missing_ok=True)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, which stay in one file.

        Raises:
            InputError: a name has been used.
        """
        for name, tensor in tensors.items():
            if name in self._hashes:
                raise InputError(f"pack: {name} is a tensor of the model already")
            self._hashes[name] = tensor_sha256(tensor)
        self._shards.add(tensors)

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the index.

        Args:
            config: `quantization_config` of the folder's config.json, which is there already.
        """
        names = set(self._shards.finish().values())
        write_index(self._folder, names, config, self._hashes)
