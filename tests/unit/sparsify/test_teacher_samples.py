"""A teacher's samples on disk: what comes back, row by row, and what a damaged cache says."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsify.data import teacher_samples
from sparsify.data.shards import is_whole
from sparsify.data.teacher_samples import (
    Sample,
    SampleFacts,
    SampleShard,
    TeacherSamples,
    sample_name,
    write_sample_manifest,
    write_samples,
)
from sparsify.errors import InputError
from tests.conftest import message

LENGTH, K = 5, 3
FACTS = SampleFacts("d" * 64, "t" * 64, "float32", K, 2.0, 1.5, 7, True, LENGTH, 100)
NUM_ROWS = (4, 0, 3)


def sample(row: int) -> Sample:
    generator = torch.Generator().manual_seed(row)
    return Sample(
        torch.randint(100, (LENGTH, K), generator=generator),
        torch.rand(LENGTH, K, generator=generator), torch.rand(LENGTH, generator=generator), 2.0,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files, one of them without rows."""
    first, shards = 0, []
    for index, num_rows in enumerate(NUM_ROWS):
        path = tmp_path / sample_name(f"tokens-00-{index:05}.safetensors")
        rows = map(sample, range(first, first + num_rows))
        shards.append(write_samples(path, rows, num_rows, FACTS))
        first += num_rows
    write_sample_manifest(tmp_path, FACTS, shards)
    return tmp_path


def test_rows_come_back_by_number_in_the_order_asked_for(folder: Path) -> None:
    cache = TeacherSamples.open(folder)
    assert len(cache) == sum(NUM_ROWS)
    assert cache.facts == FACTS
    for one in (cache, pickle.loads(pickle.dumps(cache))):
        found = one.rows(torch.tensor([5, 0, 3, 5]))
        for name in ("ids_NK", "weights_NK", "entropy_N"):
            expected = torch.cat([getattr(sample(row), name) for row in (5, 0, 3, 5)])
            assert torch.equal(getattr(found, name), expected)
            assert getattr(found, name).dtype == expected.dtype
        assert found.temperature == 2.0


def test_a_file_larger_than_the_memory_is_read(tmp_path: Path) -> None:
    num_rows = 2**40 // (LENGTH * FACTS.token_bytes)
    head, starts = teacher_samples._header(teacher_samples._layout(num_rows, FACTS))
    path = tmp_path / "samples-00-00000.safetensors"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(starts[-1])  # sparse: it takes no room on the disk
        file.seek(starts[-1] - 4)
        file.write(b"\0\0\x80?")
    shard = SampleShard(path.name, num_rows, path.stat().st_size, "0" * 64)
    write_sample_manifest(tmp_path, FACTS, [shard])
    found = TeacherSamples.open(tmp_path).rows([0, num_rows - 1])
    assert found.entropy_N.tolist() == [0.0] * (2 * LENGTH - 1) + [1.0]


def test_rows_that_are_not_there_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"teacher cache .*: row 7; it has 7 rows"):
        TeacherSamples.open(folder).rows([0, 7])


def test_files_are_safetensors_of_so_many_bytes_per_token(folder: Path) -> None:
    cache = TeacherSamples.open(folder)
    path = folder / cache.shards[0].file
    tensors = load_file(path)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "ids": (4, LENGTH, K), "weights": (4, LENGTH, K), "entropy": (4, LENGTH),
    }  # fmt: skip
    assert torch.equal(tensors["ids"][2].long(), sample(2).ids_NK)
    data = sum(t.numel() * t.element_size() for t in tensors.values())
    assert data == 4 * LENGTH * FACTS.token_bytes == 4 * LENGTH * (8 * K + 4)
    before = path.read_bytes()
    write_samples(path, map(sample, range(4)), 4, FACTS)
    assert path.read_bytes() == before
    assert [p.name for p in folder.glob(".*")] == []


def test_the_digest_is_of_everything_that_was_drawn(folder: Path) -> None:
    shards = TeacherSamples.open(folder).shards
    digests = {TeacherSamples.open(folder).digest}
    for facts in (replace(FACTS, seed=8), replace(FACTS, store_digest="e" * 64)):
        write_sample_manifest(folder, facts, shards)
        digests.add(TeacherSamples.open(folder).digest)
    write_sample_manifest(folder, FACTS, [*shards[:2], replace(shards[2], sha256="0" * 64)])
    digests.add(TeacherSamples.open(folder).digest)
    assert len(digests) == 4


def test_damage_is_named(folder: Path) -> None:
    cache = TeacherSamples.open(folder)
    shard = cache.shards[2]
    path, whole = folder / shard.file, (folder / shard.file).read_bytes()

    def refused(data: bytes | None) -> str:
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        assert not is_whole(folder, shard)
        with pytest.raises(InputError) as error:
            TeacherSamples.open(folder)
        text = message(error)
        assert text.startswith(f"{path}: ")
        assert text.endswith("jobs.teach again, which replaces damaged files")
        path.write_bytes(whole)
        return text

    assert "is missing" in refused(None)
    assert f"{len(whole) - 1:,} bytes, the manifest says {len(whole):,}" in refused(whole[:-1])
    assert "its header differs" in refused(whole.replace(b"weights", b"weighty"))
    assert is_whole(folder, shard)
    cache.verify_shard(shard)
    changed = bytearray(whole)
    changed[-20] ^= 1  # seen by the hash alone
    path.write_bytes(changed)
    with pytest.raises(InputError, match="SHA-256 changed"):
        TeacherSamples.open(folder).verify_shard(shard)


def test_a_manifest_that_is_none_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for text, words in (
        ("{", "not JSON"),
        (json.dumps({**manifest, "seed": 8}), "was changed since"),
        (json.dumps({**manifest, "version": 99}), "version 99 of the format"),
        (json.dumps({**manifest, "format": "twofour-tokens"}), "not the manifest of a teacher"),
        (None, "has no manifest.json, so it is not finished"),
    ):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(InputError, match=words) as error:
            TeacherSamples.open(folder)
        assert message(error)
    with pytest.raises(InputError, match="there is no such folder; make one with"):
        TeacherSamples.open(folder / "none")
