"""A teacher's samples on disk, for the rows of one token store: drawn once, mapped into memory.

A cache is a folder with one safetensors file for every shard of the store, in the same order, and
`manifest.json`, which is written last, so that a folder with a manifest is whole. A file holds

    ids      (rows, T, K)  int32
    weights  (rows, T, K)  float32
    entropy  (rows, T)     float32

of `sparsify.distillation.sampling.draw`, 8 K + 4 bytes per token. Its row i is the shard's row i,
so that a row has one number in the store and in the cache. Nothing in the manifest depends on where
the folder, the store or the teacher lie.
Shape suffixes: N tokens, R rows, T tokens of a row, K samples of a token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsify.data.store import MANIFEST, SHARD_PREFIX, manifest_digest
from sparsify.errors import InputError
from sparsify.files import file_sha256, fsync, write_json

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Sample:
    """Token ids drawn from a teacher, in place of its logits."""

    ids_NK: Tensor
    """int64; an id may come more than once"""
    weights_NK: Tensor
    """float32; sum_k weight_k [id_k = v] is an unbiased estimate of the probability of v"""
    entropy_N: Tensor
    """float32 entropy of the teacher's distribution in nats; 0 where it is not known"""
    temperature: float
    """divisor of the teacher's logits when it was drawn"""

    def to(self, device: torch.device | str) -> Sample:
        """The same sample on `device`."""
        return Sample(
            self.ids_NK.to(device), self.weights_NK.to(device), self.entropy_N.to(device),
            self.temperature,
        )  # fmt: skip


FORMAT = "twofour-teacher-sample"

VERSION = 1

_PREFIX = "samples-"

_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class SampleFacts:
    """What decides every byte of a cache."""

    store_digest: str
    """of the token store whose rows the teacher read"""
    teacher_sha256: str
    """fingerprint of the teacher's folder"""
    dtype: str
    """type the teacher's weights were held in"""
    num_samples: int
    """K"""
    temperature: float
    flatness: float
    seed: int
    isolate_documents: bool
    """whether documents packed into one row were kept apart"""
    sequence_length: int
    """T"""
    num_words: int
    """ids that the teacher's head tells apart"""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's sample."""
        return 8 * self.num_samples + 4


@dataclass(frozen=True)
class SampleShard:
    """One file of a cache."""

    file: str
    """name in the cache's folder"""
    num_rows: int
    num_bytes: int
    sha256: str
    """of the whole file"""


def sample_name(shard_file: str) -> str:
    """File name of the samples of a store's shard."""
    return _PREFIX + shard_file.removeprefix(SHARD_PREFIX)


def write_samples(
    path: Path, rows: Iterable[Sample], num_rows: int, facts: SampleFacts
) -> SampleShard:
    """Write one file, whole or not at all.

    Args:
        path: the file.
        rows: the sample of each row, T tokens of K ids; taken one by one.
        num_rows: how many there are.
        facts: T and K.

    Cost: the memory of one row. The same samples give the same bytes.
    """
    shapes = _shapes(num_rows, facts)
    header = _header(shapes)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    starts = [len(header) + offset for offset in _offsets(shapes)]
    with temporary.open("wb") as file:
        file.write(header)
        file.truncate(starts[-1])
        count = 0
        for sample in rows:
            parts = (sample.ids_NK.int(), sample.weights_NK.float(), sample.entropy_N.float())
            for start, part in zip(starts, parts, strict=False):
                data = part.cpu().numpy().tobytes()
                file.seek(start + count * len(data))
                file.write(data)
            count += 1
    assert count == num_rows, f"{count} rows of {num_rows}"
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)
    return SampleShard(path.name, num_rows, path.stat().st_size, file_sha256(path))


def write_sample_manifest(folder: Path, facts: SampleFacts, shards: Sequence[SampleShard]) -> None:
    """Make a folder of files a cache.

    Args:
        folder: where they are.
        facts: what they were made from.
        shards: in the order of the store's.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **asdict(facts),
        "shards": [asdict(shard) for shard in shards],
    }
    write_json(folder / MANIFEST, {**manifest, "digest": manifest_digest(manifest)})


def read_sample_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as plain values, its format, version and digest checked.

    Raises:
        InputError: missing, damaged, or of another format or version.
    """
    path = folder / MANIFEST
    again = "remove the folder and run python -m jobs.teach again"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not folder.is_dir():
            raise InputError(
                f"teacher cache {folder}: there is no such folder; make one with "
                "python -m jobs.teach"
            ) from None
        raise InputError(
            f"teacher cache {folder}: has no {MANIFEST}, so it is not finished; run the same "
            "python -m jobs.teach again"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); copy the cache again, or {again}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(
            f"{path}: not the manifest of a teacher cache (format {FORMAT!r}); give a folder that "
            "python -m jobs.teach made"
        )
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path}: version {manifest.get('version')} of the format, this program reads "
            f"{VERSION}; {again}"
        )
    if manifest.get("digest") != manifest_digest(manifest):
        raise InputError(f"{path}: was changed since it was written; copy it again, or {again}")
    return manifest


def facts_of(manifest: Mapping[str, Any]) -> SampleFacts:
    """What a cache was made from."""
    return SampleFacts(**{name: manifest[name] for name in SampleFacts.__dataclass_fields__})


class SampleCache:
    """The samples of a cache, mapped into memory.

    Make one with `open`. Files are mapped at first use, and once; the object can be sent to another
    process, which then maps them itself.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.facts = facts_of(manifest)
        self.digest = str(manifest["digest"])
        """SHA-256 (hex) over everything that the manifest says, the files' hashes among it"""
        self.shards = tuple(SampleShard(**shard) for shard in manifest["shards"])
        self._first_rows = np.cumsum([0, *(shard.num_rows for shard in self.shards)])
        self._maps: dict[int, list[NDArray[Any]]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> SampleCache:
        """The cache in `folder`, its manifest and the sizes and headers of its files checked.

        Raises:
            InputError: no cache, not finished, of another version; a file missing, truncated or of
                another shape. Bytes changed inside a file are found by `verify_shard` only.
        """
        cache = cls(Path(folder), read_sample_manifest(Path(folder)))
        for shard in cache.shards:
            cache._data_start(shard)
        return cache

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def verify_shard(self, shard: SampleShard) -> None:
        """Read and hash one of `shards`.

        Raises:
            InputError: it is missing or differs from what was written.
        """
        self._data_start(shard)
        if file_sha256(self.folder / shard.file) != shard.sha256:
            raise self._damaged(shard, "its SHA-256 changed since it was written")

    def rows(self, indices: Tensor | Sequence[int]) -> Sample:
        """The samples of rows by their numbers, one row's T tokens after another's.

        Args:
            indices: int64 (R,), each in range(len(cache)); repeats are allowed.

        Cost: reads 8 K + 4 bytes per token, allocates 12 K + 4.
        """
        index_R = np.asarray(indices, dtype=np.int64).reshape(-1)
        assert not index_R.size or 0 <= index_R.min() <= index_R.max() < len(self)
        shard_R = np.searchsorted(self._first_rows, index_R, side="right") - 1
        length, num_samples = self.facts.sequence_length, self.facts.num_samples
        wide = (len(index_R), length, num_samples)
        found: list[NDArray[Any]] = [
            np.empty(wide, np.int64), np.empty(wide, np.float32), np.empty(wide[:2], np.float32),
        ]  # fmt: skip
        for shard in np.unique(shard_R).tolist():
            at = np.flatnonzero(shard_R == shard)
            local = index_R[at] - self._first_rows[shard]
            for out, mapped in zip(found, self._mapped(shard), strict=True):
                out[at] = mapped[local]
        ids_NK, weights_NK, entropy_N = (torch.from_numpy(out).flatten(0, 1) for out in found)
        return Sample(ids_NK, weights_NK, entropy_N, self.facts.temperature)

    def _mapped(self, index: int) -> list[NDArray[Any]]:
        if index not in self._maps:
            shard = self.shards[index]
            path, start = self.folder / shard.file, self._data_start(shard)
            shapes = _shapes(shard.num_rows, self.facts)
            # As plain arrays: a memmap makes every slice another memmap, which takes longer.
            self._maps[index] = [
                np.memmap(path, kind, "r", start + offset, shape).view(np.ndarray)
                for (_, kind, _, shape), offset in zip(shapes, _offsets(shapes), strict=False)
            ]
        return self._maps[index]

    def _data_start(self, shard: SampleShard) -> int:
        """Where the tensors begin in the file; checks its size and its header."""
        path = self.folder / shard.file
        if not path.is_file():
            raise self._damaged(shard, "is missing")
        found = path.stat().st_size
        if found != shard.num_bytes:
            raise self._damaged(shard, f"{found:,} bytes, the manifest says {shard.num_bytes:,}")
        shapes = _shapes(shard.num_rows, self.facts)
        header = _header(shapes)
        with path.open("rb") as file:
            if file.read(len(header)) != header or len(header) + _offsets(shapes)[-1] != found:
                raise self._damaged(shard, "its header differs from the manifest")
        return len(header)

    def _damaged(self, shard: SampleShard, what: str) -> InputError:
        return InputError(
            f"{self.folder / shard.file}: {what}; copy the file again, or run the same "
            "python -m jobs.teach again, which makes damaged files anew"
        )


_Tensor = tuple[str, np.dtype[Any], str, tuple[int, ...]]


def _shapes(num_rows: int, facts: SampleFacts) -> list[_Tensor]:
    """Name, type, the type's name and shape of a file's tensors, in their order."""
    wide = (num_rows, facts.sequence_length, facts.num_samples)
    return [
        ("ids", np.dtype("<i4"), "I32", wide),
        ("weights", np.dtype("<f4"), "F32", wide),
        ("entropy", np.dtype("<f4"), "F32", wide[:2]),
    ]


def _offsets(shapes: Sequence[_Tensor]) -> list[int]:
    """Where each tensor begins behind the header, and where the last one ends."""
    offsets = [0]
    for _, kind, _, shape in shapes:
        offsets.append(offsets[-1] + kind.itemsize * int(np.prod(shape)))
    return offsets


def _header(shapes: Sequence[_Tensor]) -> bytes:
    """The head of the safetensors file: its length in 8 bytes, then JSON.

    Written here, because a file is larger than memory may be and is filled row by row.
    """
    offsets = _offsets(shapes)
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    for (name, _, type_name, shape), start, end in zip(shapes, offsets, offsets[1:], strict=False):
        entries[name] = {"dtype": type_name, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text
