"""Folders of numbered rows: safetensors files ("shards") and a manifest, mapped into memory.

`manifest.json` is written last, so that a folder with a manifest is whole. Rows are numbered
through the shards in the manifest's order. Nothing in a manifest depends on where its folder lies.
Shape suffixes: N rows.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify.errors import InputError
from sparsify.files import file_sha256, write_json

MANIFEST = "manifest.json"

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a shard's tensor -> its type, as safetensors files write it, and its shape."""


class AnyShard(Protocol):
    """What a manifest says of a file, whatever its rows hold."""

    @property
    def file(self) -> str:
        """Name in the folder."""

    @property
    def num_rows(self) -> int:
        """First dimension of its tensors."""

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""

    @property
    def sha256(self) -> str:
        """Of the whole file."""


S = TypeVar("S", bound=AnyShard)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make a folder of shards whole: its manifest and the manifest's digest."""
    write_json(folder / MANIFEST, {**manifest, "digest": manifest_digest(manifest)})


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a manifest without its digest."""
    plain = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def is_whole(folder: Path, shard: AnyShard) -> bool:
    """Whether the shard's file is there with the size and the hash that were written."""
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.num_bytes:
        return False
    return file_sha256(path) == shard.sha256


class ShardFolder(ABC, Generic[S]):
    """The rows of such a folder.

    Make one with `open`. Files are mapped at first use, and once; the object can be sent to another
    process, which then maps them itself.
    """

    KIND: ClassVar[str]
    """what such a folder is called, for messages"""
    COMMAND: ClassVar[str]
    """the command that makes one"""
    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.digest = str(manifest["digest"])
        """SHA-256 (hex) over everything that the manifest says, the shards' hashes among it"""
        self.shards = tuple(self._shards_of(manifest))
        """all its files, in the order in which their rows are numbered"""
        self._first_rows = np.cumsum([0, *(shard.num_rows for shard in self.shards)])
        self._maps: dict[int, list[NDArray[Any]]] = {}

    @abstractmethod
    def _shards_of(self, manifest: Mapping[str, Any]) -> Sequence[S]:
        """The shards that a checked manifest lists."""

    @abstractmethod
    def _layout(self, num_rows: int) -> Layout:
        """The tensors of a shard of so many rows, the row first in every shape."""

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The rows in `folder`, its manifest, and the sizes and headers of its shards checked.

        Raises:
            InputError: no such folder, not finished, of another version; a shard missing, truncated
                or of another shape. Bytes changed inside one are found by `verify_shard` only.
        """
        found = cls(Path(folder), cls.read_manifest(Path(folder)))
        for shard in found.shards:
            found._map(shard)
        return found

    @classmethod
    def read_manifest(cls, folder: Path) -> dict[str, Any]:
        """The manifest as plain values, its format, version and digest checked.

        Raises:
            InputError: missing, damaged, or of another format or version.
        """
        path = folder / MANIFEST
        again = f"remove the folder and run {cls.COMMAND} again"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            state = f"there is no such folder; make one with {cls.COMMAND}"
            if folder.is_dir():
                state = f"has no {MANIFEST}, so it is not finished; run {cls.COMMAND} again"
            raise InputError(f"{cls.KIND} {folder}: {state}") from None
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}); copy it again, or {again}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != cls.FORMAT:
            raise InputError(
                f"{path}: not the manifest of a {cls.KIND} (format {cls.FORMAT!r}); give a folder "
                f"that {cls.COMMAND} made"
            )
        if manifest.get("version") != cls.VERSION:
            raise InputError(
                f"{path}: version {manifest.get('version')} of the format, this program reads "
                f"{cls.VERSION}; {again}"
            )
        if manifest.get("digest") != manifest_digest(manifest):
            raise InputError(f"{path}: was changed since it was written; copy it again, or {again}")
        return manifest

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def shard_rows(self, index: int) -> range:
        """The numbers of the rows of one of `shards`."""
        return range(int(self._first_rows[index]), int(self._first_rows[index + 1]))

    def verify_shard(self, shard: S) -> None:
        """Read and hash one of `shards`.

        Raises:
            InputError: it is missing or differs from what was written.
        """
        self._map(shard)
        if file_sha256(self.folder / shard.file) != shard.sha256:
            raise self._damaged(shard, "its SHA-256 changed since it was written")

    def _gather(self, indices: Tensor | Sequence[int]) -> list[NDArray[Any]]:
        """The tensors of rows by their numbers, in the order asked for; `ids` become int64.

        Args:
            indices: int64 (N,), each in range(len(self)); repeats are allowed.

        Raises:
            InputError: no such row.
        """
        index_N = np.asarray(indices, dtype=np.int64).reshape(-1)
        if index_N.size and not 0 <= index_N.min() <= index_N.max() < len(self):
            wrong = index_N[(index_N < 0) | (index_N >= len(self))][0]
            raise InputError(f"{self.KIND} {self.folder}: row {wrong}; it has {len(self)} rows")
        shard_N = np.searchsorted(self._first_rows, index_N, side="right") - 1
        gathered = [
            np.empty(shape, np.int64 if name == "ids" else _NUMPY_TYPES[kind])
            for name, (kind, shape) in self._layout(len(index_N)).items()
        ]
        for shard in np.unique(shard_N).tolist():
            at = np.flatnonzero(shard_N == shard)
            local = index_N[at] - self._first_rows[shard]
            if shard not in self._maps:
                self._maps[shard] = self._map(self.shards[shard])
            for out, mapped in zip(gathered, self._maps[shard], strict=True):
                out[at] = mapped[local]
        return gathered

    def _map(self, shard: S) -> list[NDArray[Any]]:
        """The tensors of a shard, mapped and not yet read; checks its size and its header."""
        path, layout = self.folder / shard.file, self._layout(shard.num_rows)
        if not path.is_file():
            raise self._damaged(shard, "is missing")
        size = path.stat().st_size
        if size != shard.num_bytes:
            raise self._damaged(shard, f"{size:,} bytes, the manifest says {shard.num_bytes:,}")
        try:
            with safe_open(path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.offset_keys()}
        except SafetensorError:
            raise self._damaged(shard, "its header is not that of a shard") from None
        found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        is_in_order = list(found) == list(layout) or not shard.num_rows  # nothing has no order
        if found != layout or not is_in_order:
            raise self._damaged(shard, "its header differs from the manifest")
        types = [_NUMPY_TYPES[kind] for kind, _ in layout.values()]
        shapes = [shape for _, shape in layout.values()]
        sizes = [kind.itemsize * prod(shape) for kind, shape in zip(types, shapes, strict=True)]
        # The tensors fill the file to its end. Mapped for reading alone: a torch tensor's mapping
        # may be written to, so that a file larger than the memory is refused. As plain arrays: a
        # memmap makes every slice another memmap, which takes longer.
        starts = accumulate(sizes[:-1], initial=size - sum(sizes))
        return [
            np.memmap(path, kind, "r", start, shape).view(np.ndarray)
            for kind, start, shape in zip(types, starts, shapes, strict=True)
        ]

    def _damaged(self, shard: S, what: str) -> InputError:
        return InputError(
            f"{self.folder / shard.file}: {what}; copy the file again, or run the same "
            f"{self.COMMAND} again, which replaces damaged files"
        )


_NUMPY_TYPES = {
    name: np.dtype(kind)
    for name, kind in (("U8", "u1"), ("U16", "<u2"), ("U32", "<u4"), ("I32", "<i4"), ("F32", "<f4"))
}
