"""A teacher's samples on disk, for the rows of one token store: drawn once, mapped into memory.

A cache is a folder of shards (see `sparsify.data.shards`), one for every shard of the store, in the
same order. A file holds

    ids      (rows, T, K)  int32
    weights  (rows, T, K)  float32
    entropy  (rows, T)     float32

of `sparsify.distillation.sampling.draw`, 8 K + 4 bytes per token. Its row i is the shard's row i,
so that a row has one number in the store and in the cache.
Shape suffixes: N tokens, R rows, T tokens of a row, K samples of a token.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.data.shards import Layout, ShardFolder, write_manifest
from sparsify.data.store import SHARD_PREFIX
from sparsify.files import file_sha256, written_whole


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

_ALIGNMENT_BYTES = 8  # of the head

_ITEM_BYTES = 4  # of an id, a weight and an entropy


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
        rows: the sample of each row, T tokens of K ids; taken one at a time.
        num_rows: how many there are.
        facts: T and K.

    Cost: the memory of one row. The same samples give the same bytes.
    """
    header, starts = _header(_layout(num_rows, facts))
    with written_whole(path) as temporary, temporary.open("wb") as file:
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
    write_manifest(folder, manifest)


def facts_of(manifest: Mapping[str, Any]) -> SampleFacts:
    """What a cache was made from."""
    return SampleFacts(**{name: manifest[name] for name in SampleFacts.__dataclass_fields__})


class TeacherSamples(ShardFolder[SampleShard]):
    """The samples of a cache."""

    KIND, COMMAND = "teacher cache", "python -m jobs.teach"
    FORMAT, VERSION = FORMAT, VERSION

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        super().__init__(folder, manifest)
        self.facts = facts_of(manifest)

    def _shards_of(self, manifest: Mapping[str, Any]) -> list[SampleShard]:
        return [SampleShard(**shard) for shard in manifest["shards"]]

    def rows(self, indices: Tensor | Sequence[int]) -> Sample:
        """The samples of rows by their numbers, one row's T tokens after another's.

        Args:
            indices: int64 (R,), each in range(len(cache)); repeats are allowed.

        Cost: reads 8 K + 4 bytes per token, allocates 12 K + 4.
        """
        ids_NK, weights_NK, entropy_N = (
            torch.from_numpy(part).flatten(0, 1) for part in self._gather(indices)
        )
        return Sample(ids_NK, weights_NK, entropy_N, self.facts.temperature)

    def _layout(self, num_rows: int) -> Layout:
        return _layout(num_rows, self.facts)


def _layout(num_rows: int, facts: SampleFacts) -> Layout:
    wide = (num_rows, facts.sequence_length, facts.num_samples)
    return {"ids": ("I32", wide), "weights": ("F32", wide), "entropy": ("F32", wide[:2])}


def _header(layout: Layout) -> tuple[bytes, list[int]]:
    """The head of the safetensors file, and where each tensor begins and the last one ends.

    Its length in 8 bytes, then JSON. Written here, because a file is larger than memory may be and
    is filled row by row.
    """
    sizes = (_ITEM_BYTES * math.prod(shape) for _, shape in layout.values())
    ends = [0, *itertools.accumulate(sizes)]
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    for (name, (kind, shape)), span in zip(layout.items(), itertools.pairwise(ends), strict=True):
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": span}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    head = len(text).to_bytes(8, "little") + text
    return head, [len(head) + end for end in ends]
