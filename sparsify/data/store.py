"""Tokenised rows on disk: written once, mapped into memory, read in any order.

A store is a folder with safetensors files ("shards") and `manifest.json`, which is written last, so
that a folder with a manifest is whole. A shard holds rows of one source in two tensors:

    ids     (rows, T)            uint16 where the vocabulary fits into it, else uint32
    starts  (rows, ceil(T / 8))  uint8; token i of a row begins a document if bit i % 8 (counted
                                 from the lowest) of byte i // 8 is 1; unused bits are 0

A document that does not end with its row goes on in the next one, whose first token then begins no
document. Rows are numbered through the shards and sources in the order of the manifest. Nothing in
the manifest depends on where the folder or its sources lie.
Shape suffixes: N rows, T tokens of a row, B bytes of a row's starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsify.data.order import TrainingOrder
from sparsify.data.rows import TokenRows, tokenizer_digest
from sparsify.errors import InputError
from sparsify.files import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "manifest.json"

FORMAT = "twofour-tokens"

VERSION = 1

SHARD_PREFIX = "tokens-"

ID_TYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "uint16": ("U16", np.dtype("<u2")),
    "uint32": ("U32", np.dtype("<u4")),
}

_HEADER_LIMIT_BYTES = 100_000


@dataclass(frozen=True)
class Shard:
    """One file of a store."""

    file: str
    """name in the store's folder"""
    num_rows: int
    num_tokens: int
    """of the rows; always num_rows times the row's length"""
    num_documents: int
    """documents that begin in its text, the dropped tail included"""
    num_dropped_tokens: int
    """tokens behind the last whole row, which are not in the store"""
    num_bytes: int
    sha256: str
    """of the whole file"""


@dataclass(frozen=True)
class StoreSource:
    """One source of a store: what it was and its shards."""

    name: str
    weight: float
    """share of the training rows that come from it; the shares of all sources sum to 1"""
    fingerprint: str
    """SHA-256 of the content the rows were made from"""
    shards: tuple[Shard, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all its shards."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all its rows."""
        return sum(shard.num_tokens for shard in self.shards)


def id_type(vocab_size: int) -> str:
    """Type that token ids below `vocab_size` are stored in."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def is_store(path: str | Path) -> bool:
    """Whether a path is meant as a store: a folder with its manifest, or with shards of one."""
    folder = Path(path)
    if not folder.is_dir():
        return False
    if next(folder.glob(f"{SHARD_PREFIX}*.safetensors"), None) is not None:
        return True
    manifest = folder / MANIFEST
    return manifest.is_file() and FORMAT.encode() in manifest.read_bytes()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a manifest without its digest."""
    plain = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as plain values, its format, version and digest checked.

    Raises:
        InputError: missing, damaged, or of another format or version.
    """
    path = folder / MANIFEST
    again = "remove the folder and tokenise again"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not folder.is_dir():
            raise InputError(f"token store {folder}: there is no such folder") from None
        raise InputError(
            f"token store {folder}: has no {MANIFEST}, so it is not finished; run the same "
            "python -m jobs.tokenize again"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); copy the store again, or {again}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: not the manifest of a token store (format {FORMAT!r})")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path}: version {manifest.get('version')} of the format, this program reads "
            f"{VERSION}; {again}"
        )
    if manifest.get("digest") != manifest_digest(manifest):
        raise InputError(f"{path}: was changed since it was written; copy it again, or {again}")
    return manifest


class TokenStore:
    """The rows of a store, mapped into memory.

    Make one with `open`. Files are opened at first use, and once; the object can be sent to
    another process, which then opens them itself.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.sequence_length = int(manifest["sequence_length"])
        self.vocab_size = int(manifest["vocab_size"])
        self.tokenizer_sha256 = str(manifest["tokenizer_sha256"])
        self.digest = str(manifest["digest"])
        """SHA-256 (hex) over everything that the manifest says, the shards' hashes among it"""
        self.settings = dict(manifest["settings"])
        self.sources = tuple(_source_of(entry) for entry in manifest["sources"])
        self._type_name, self._ids_type = ID_TYPES[manifest["ids"]]
        self._shards = [shard for source in self.sources for shard in source.shards]
        self._first_rows = np.cumsum([0, *(shard.num_rows for shard in self._shards)])
        self._maps: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """The store in `folder`, its manifest, and the sizes and headers of its shards checked.

        Raises:
            InputError: no store, not finished, of another version; a shard missing, truncated or
                of another shape. Bytes changed inside a shard are found by `verify` only.
        """
        store = cls(Path(folder), read_manifest(Path(folder)))
        for shard in store._shards:
            store._data_start(shard)
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return len(self) * self.sequence_length

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All its files, in the order in which their rows are numbered."""
        return tuple(self._shards)

    def shard_rows(self, index: int) -> range:
        """The numbers of the rows of one of `shards`."""
        return range(int(self._first_rows[index]), int(self._first_rows[index + 1]))

    def order(self, seed: int) -> TrainingOrder:
        """The training order over the store's sources by their weights; its rows are `rows`'s."""
        num_rows = [source.num_rows for source in self.sources]
        return TrainingOrder(num_rows, [source.weight for source in self.sources], seed)

    def verify(self) -> None:
        """Read and hash every shard.

        Raises:
            InputError: one is missing or differs from what was written.

        Cost: reads the whole store once.
        """
        for shard in self._shards:
            self.verify_shard(shard)

    def verify_shard(self, shard: Shard) -> None:
        """`verify` for one of `shards`."""
        self._data_start(shard)
        if file_sha256(self.folder / shard.file) != shard.sha256:
            raise self._damaged(shard, "its SHA-256 changed since it was written")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        """Require the tokenizer that made the store.

        Args:
            tokenizer: of the model that will read the rows.
            model: the model's name, for the message.

        Raises:
            InputError: it is another one.
        """
        found = tokenizer_digest(tokenizer)
        if found != self.tokenizer_sha256:
            raise InputError(
                f"token store {self.folder}: made with another tokenizer "
                f"({self.tokenizer_sha256[:12]}) than that of {model} ({found[:12]}); tokenise "
                "the text again with model.path= of that model"
            )

    def rows(self, indices: Tensor | Sequence[int]) -> TokenRows:
        """Rows by their numbers, in the order asked for.

        Args:
            indices: int64 (N,), each in range(len(store)); repeats are allowed.

        Returns:
            ids_NT and positions_NT as `sparsify.data.rows.token_rows` makes them.

        Raises:
            InputError: no such row.

        Cost: reads N T ids and N T / 8 bytes of starts; allocates 8 + 8 bytes per token.
        """
        index_N = np.asarray(indices, dtype=np.int64).reshape(-1)
        if index_N.size and not 0 <= index_N.min() <= index_N.max() < len(self):
            wrong = index_N[(index_N < 0) | (index_N >= len(self))][0]
            raise InputError(f"token store {self.folder}: row {wrong}; it has {len(self)} rows")
        shard_N = np.searchsorted(self._first_rows, index_N, side="right") - 1
        ids_NT = np.empty((len(index_N), self.sequence_length), dtype=np.int64)
        starts_NB = np.empty((len(index_N), self._num_start_bytes), dtype=np.uint8)
        for shard in np.unique(shard_N).tolist():
            at = np.flatnonzero(shard_N == shard)
            local = index_N[at] - self._first_rows[shard]
            ids, starts = self._mapped(shard)
            ids_NT[at] = ids[local]
            starts_NB[at] = starts[local]
        positions_NT = self._positions(starts_NB)
        return TokenRows(torch.from_numpy(ids_NT), torch.from_numpy(positions_NT))

    @property
    def _num_start_bytes(self) -> int:
        return -(-self.sequence_length // 8)

    @cached_property
    def _places_T(self) -> NDArray[np.int64]:
        return np.arange(self.sequence_length, dtype=np.int64)

    def _positions(self, starts_NB: NDArray[np.uint8]) -> NDArray[np.int64]:
        """int64 (N, T): distance from the last start; the first token of a row counts as one."""
        is_start_NT = np.unpackbits(
            starts_NB, axis=1, count=self.sequence_length, bitorder="little"
        ).view(bool)
        last_NT = np.where(is_start_NT, self._places_T, 0)
        np.maximum.accumulate(last_NT, axis=1, out=last_NT)
        return np.subtract(self._places_T, last_NT, out=last_NT)

    def _mapped(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if index not in self._maps:
            shard = self._shards[index]
            path, start = self.folder / shard.file, self._data_start(shard)
            shape = (shard.num_rows, self.sequence_length)
            ids = np.memmap(path, self._ids_type, "r", start, shape)
            shape = (shard.num_rows, self._num_start_bytes)
            starts = np.memmap(path, np.uint8, "r", start + ids.nbytes, shape)
            # As plain arrays: a memmap makes every slice another memmap, which takes longer.
            self._maps[index] = ids.view(np.ndarray), starts.view(np.ndarray)
        return self._maps[index]

    def _data_start(self, shard: Shard) -> int:
        """Where the ids begin in the shard's file; checks its size and its header."""
        path = self.folder / shard.file
        if not path.is_file():
            raise self._damaged(shard, "is missing")
        found = path.stat().st_size
        if found != shard.num_bytes:
            raise self._damaged(shard, f"{found:,} bytes, the manifest says {shard.num_bytes:,}")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, _HEADER_LIMIT_BYTES))
        try:
            header = json.loads(text)
            tensors = {name: header[name] for name in ("ids", "starts")}
            found_shapes = [(t["dtype"], t["shape"], t["data_offsets"]) for t in tensors.values()]
        except (ValueError, KeyError, TypeError):
            raise self._damaged(shard, "its header is not that of a shard") from None
        num_rows, width = shard.num_rows, self._num_start_bytes
        ids_bytes = num_rows * self.sequence_length * self._ids_type.itemsize
        end = ids_bytes + num_rows * width
        expected = [
            (self._type_name, [num_rows, self.sequence_length], [0, ids_bytes]),
            ("U8", [num_rows, width], [ids_bytes, end]),
        ]
        if found_shapes != expected or 8 + length + end != shard.num_bytes:
            raise self._damaged(shard, "its header differs from the manifest")
        return 8 + length

    def _damaged(self, shard: Shard, what: str) -> InputError:
        return InputError(
            f"{self.folder / shard.file}: {what}; copy the file again, or run the same "
            "python -m jobs.tokenize again, which makes damaged shards anew"
        )


def _source_of(entry: Mapping[str, Any]) -> StoreSource:
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    return StoreSource(entry["name"], float(entry["weight"]), entry["fingerprint"], shards)
