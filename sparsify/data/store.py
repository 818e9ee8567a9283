"""Tokenised rows on disk: written once, mapped into memory, read in any order.

A store is a folder of shards (see `sparsify.data.shards`), each with rows of one source in two
tensors:

    ids     (rows, T)            uint16 where the vocabulary fits into it, else uint32
    starts  (rows, ceil(T / 8))  uint8; token i of a row begins a document if bit i % 8 (counted
                                 from the lowest) of byte i // 8 is 1; unused bits are 0

and, where the manifest says `has_answers`, the tokens that are to be learned, in the same bits:

    trained (rows, ceil(T / 8))  uint8

A document that does not end with its row continues in the next one, whose first token then begins
no document.
Shape suffixes: N rows, T tokens of a row, B bytes of a row's starts.
"""

from __future__ import annotations

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
from sparsify.data.shards import MANIFEST, Layout, ShardFolder
from sparsify.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "twofour-tokens"

VERSION = 1

SHARD_PREFIX = "tokens-"

ID_TYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "uint16": ("U16", np.dtype("<u2")),
    "uint32": ("U32", np.dtype("<u4")),
}


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
    """tokens after the last whole row, which are not in the store"""
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
    """Whether a path is meant as a store: a folder with its manifest, or with shards of one.

    Raises:
        InputError: there is no permission to look.
    """
    folder = Path(path)
    try:
        if not folder.is_dir():
            return False
        if next(folder.glob(f"{SHARD_PREFIX}*.safetensors"), None) is not None:
            return True
        manifest = folder / MANIFEST
        return manifest.is_file() and FORMAT.encode() in manifest.read_bytes()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be read ({error}); check the name and the permissions"
        ) from None


class TokenStore(ShardFolder[Shard]):
    """The rows of a store."""

    KIND, COMMAND = "token store", "python -m jobs.tokenize"
    FORMAT, VERSION = FORMAT, VERSION

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.sources = tuple(_source_of(entry) for entry in manifest["sources"])
        super().__init__(folder, manifest)
        self.sequence_length = int(manifest["sequence_length"])
        self.vocab_size = int(manifest["vocab_size"])
        self.tokenizer_sha256 = str(manifest["tokenizer_sha256"])
        self._ids_type = ID_TYPES[manifest["ids"]][0]
        self._has_answers = bool(manifest.get("has_answers"))

    def _shards_of(self, manifest: Mapping[str, Any]) -> list[Shard]:
        return [shard for source in self.sources for shard in source.shards]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return len(self) * self.sequence_length

    def order(self, seed: int) -> TrainingOrder:
        """The training order over the store's sources by their weights; its rows are `rows`'s."""
        num_rows = [source.num_rows for source in self.sources]
        return TrainingOrder(num_rows, [source.weight for source in self.sources], seed)

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
        ids_NT, starts_NB, *answers_NB = self._gather(indices)
        positions_NT = self._positions(starts_NB)
        answers = [torch.from_numpy(self._unpacked(bits)) for bits in answers_NB]
        return TokenRows(
            torch.from_numpy(ids_NT), torch.from_numpy(positions_NT),
            is_answer_NT=answers[0] if answers else None,
        )  # fmt: skip

    def _layout(self, num_rows: int) -> Layout:
        bits = ("U8", (num_rows, -(-self.sequence_length // 8)))
        layout: Layout = {"ids": (self._ids_type, (num_rows, self.sequence_length)), "starts": bits}
        return layout | ({"trained": bits} if self._has_answers else {})

    @cached_property
    def _places_T(self) -> NDArray[np.int64]:
        return np.arange(self.sequence_length, dtype=np.int64)

    def _positions(self, starts_NB: NDArray[np.uint8]) -> NDArray[np.int64]:
        """int64 (N, T): distance from the last start; the first token of a row counts as one."""
        last_NT = np.where(self._unpacked(starts_NB), self._places_T, 0)
        np.maximum.accumulate(last_NT, axis=1, out=last_NT)
        return np.subtract(self._places_T, last_NT, out=last_NT)

    def _unpacked(self, bits_NB: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """bool (N, T) of a bit for each token."""
        length = self.sequence_length
        return np.unpackbits(bits_NB, axis=1, count=length, bitorder="little").view(np.bool_)


def _source_of(entry: Mapping[str, Any]) -> StoreSource:
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    return StoreSource(entry["name"], float(entry["weight"]), entry["fingerprint"], shards)
