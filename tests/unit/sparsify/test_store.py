"""The token store: what is written comes back, and what was damaged is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.data.rows import TokenRows, token_rows, tokenizer_digest
from sparsify.data.shards import MANIFEST, is_whole, manifest_digest
from sparsify.data.store import StoreSource, TokenStore, is_store
from sparsify.data.store_write import shard_name, write_manifest, write_shard
from sparsify.errors import InputError
from sparsify.masks.storage import mask_to_bits
from tests.conftest import equal, message

LENGTH = 20  # not a multiple of 8: the starts of a row end inside a byte
STORIES = [f"Story {i}: " + "the cat sat on the mat. " * (i * 5 % 7) for i in range(60)]


class Letters:
    """A tokenizer whose tokens are the characters of a text, with ids up to `vocab_size`."""

    bos_token_id = None

    def __init__(self, vocab_size: int):
        self.eos_token_id = vocab_size - 1
        self._shift = vocab_size - 300

    def get_vocab(self):
        letters = {chr(i): i + self._shift for i in range(256)}
        return {**letters, "<end>": self.eos_token_id}

    def __call__(self, texts, verbose=True):
        if isinstance(texts, str):
            return {"input_ids": [ord(c) % 256 + self._shift for c in texts]}
        return {"input_ids": [[ord(c) + self._shift for c in text] for text in texts]}


def write_store(folder: Path, tokenizer, parts=(STORIES[:25], STORIES[25:], ["x"]), second=True):
    folder.mkdir(exist_ok=True)
    shards = [
        write_shard(folder, shard_name(0, i), part, tokenizer, LENGTH)
        for i, part in enumerate(parts)
    ]
    sources = [StoreSource("stories.txt", 0.75 if second else 1.0, "f" * 64, tuple(shards))]
    if second:
        other = write_shard(folder, shard_name(1, 0), STORIES[::-1], tokenizer, LENGTH)
        sources.append(StoreSource("back.txt", 0.25, "0" * 64, (other,)))
    write_manifest(folder, tokenizer, LENGTH, sources, {"heldout_share": 0.05})
    return folder


@pytest.fixture
def folder(tmp_path, tiny_tokenizer) -> Path:
    return write_store(tmp_path / "store", tiny_tokenizer)


def edit_manifest(folder: Path, renew_digest: bool = True, **changes) -> None:
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    if renew_digest:
        manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_rows_are_those_of_token_rows(folder, tiny_tokenizer) -> None:
    parts = (STORIES[:25], STORIES[25:], STORIES[::-1])  # the shard of one letter has no rows
    expected = TokenRows.joined([token_rows(part, tiny_tokenizer, LENGTH) for part in parts])
    assert (expected.positions_NT[:, 1:] == 0).any()
    store = TokenStore.open(folder)
    for shard in store.shards:
        store.verify_shard(shard)
    assert len(store) == len(expected)
    assert store.num_tokens == expected.num_tokens
    found = store.rows(range(len(store)))
    assert equal(found, expected)
    assert found.ids_NT.dtype == found.positions_NT.dtype == torch.int64
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))
    order = torch.cat([order, order[:3]])
    assert equal(store.rows(order), expected[order])
    assert store.rows([]).ids_NT.shape == (0, LENGTH)


def test_a_document_may_go_on_in_the_next_row(tmp_path) -> None:
    """Its second row starts at position 0, but begins no document in the file."""
    folder = write_store(tmp_path / "store", Letters(300), (["a" * 50],), second=False)
    tensors = load_file(folder / shard_name(0, 0))
    assert tensors["starts"].tolist() == [[1, 0, 0], [0, 0, 0]]
    positions = TokenStore.open(folder).rows([0, 1]).positions_NT
    assert positions.tolist() == [list(range(LENGTH))] * 2


def test_starts_are_packed_as_masks_are(folder, tiny_tokenizer) -> None:
    starts = load_file(folder / shard_name(0, 0))["starts"]
    rows = token_rows(STORIES[:25], tiny_tokenizer, LENGTH)
    is_start = rows.positions_NT == 0
    is_start[1:, 0] = False
    begun = torch.tensor([len(tiny_tokenizer(text)["input_ids"]) + 1 for text in STORIES[:25]])
    for place in (begun.cumsum(0)[:-1]).tolist():
        if place < is_start.numel():
            is_start.view(-1)[place] = True  # documents that happen to begin with a row
    assert torch.equal(starts, torch.stack([mask_to_bits(row) for row in is_start]))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.uint32)]
)
def test_type_of_the_ids(tmp_path, vocab_size, dtype) -> None:
    tokenizer = Letters(vocab_size)
    folder = write_store(tmp_path / "store", tokenizer)
    ids = load_file(folder / shard_name(0, 0))["ids"]
    assert ids.dtype == dtype
    store = TokenStore.open(folder)
    assert store.vocab_size == vocab_size
    expected = token_rows(STORIES[:25], tokenizer, LENGTH)
    assert int(expected.ids_NT.max()) == vocab_size - 1
    assert equal(store.rows(range(len(ids))), expected)


def test_counts_of_the_manifest(folder, tiny_tokenizer) -> None:
    first, second = TokenStore.open(folder).sources
    whole = [len(tiny_tokenizer(text)["input_ids"]) + 1 for text in STORIES]
    for shard, lengths in ((first.shards[0], whole[:25]), (second.shards[0], whole)):
        assert shard.num_documents == len(lengths)
        assert shard.num_tokens + shard.num_dropped_tokens == sum(lengths)
        assert shard.num_tokens == shard.num_rows * LENGTH
    empty = first.shards[2]
    assert (empty.num_rows, empty.num_documents) == (0, 1)
    assert 0 < empty.num_dropped_tokens < LENGTH


def test_the_same_text_gives_the_same_bytes_wherever_it_lies(tmp_path, tiny_tokenizer) -> None:
    first = write_store(tmp_path / "a", tiny_tokenizer)
    (tmp_path / "else").mkdir()
    second = write_store(tmp_path / "else" / "b", tiny_tokenizer)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_store_goes_to_another_process(folder) -> None:
    store = TokenStore.open(folder)
    rows = store.rows([3, 1])
    assert equal(pickle.loads(pickle.dumps(store)).rows([3, 1]), rows)


def test_order_of_a_store(folder) -> None:
    store = TokenStore.open(folder)
    order = store.order(seed=4)
    assert order.block_counts == (750, 250)
    rows = order.rows(range(4 * len(store)))
    assert int(rows.max()) == len(store) - 1  # rows of the second source come behind the first's
    assert equal(store.rows(order.batch(2, 8)), store.rows(rows[16:24]))


def test_what_is_a_store(folder, tmp_path, tiny_tokenizer) -> None:
    assert is_store(folder)
    assert is_store(str(folder))
    (folder / MANIFEST).unlink()
    assert is_store(folder)  # one that is not finished
    assert not is_store(tmp_path)
    assert not is_store(tmp_path / "nothing")
    assert not is_store("stdlib")
    (tmp_path / MANIFEST).write_text('{"text": "a data set of one file"}')
    assert not is_store(tmp_path)


# --- damage


def open_error(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        TokenStore.open(folder)
    return message(error)


def test_no_folder_and_no_manifest(folder, tmp_path) -> None:
    assert "there is no such folder" in open_error(tmp_path / "nothing")
    (folder / MANIFEST).unlink()
    assert "has no manifest.json, so it is not finished" in open_error(folder)


def test_a_damaged_or_foreign_manifest(folder) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[:-20])
    assert "not JSON" in open_error(folder)
    (folder / MANIFEST).write_text('{"format": "else"}')
    assert "not the manifest of a token store" in open_error(folder)
    (folder / MANIFEST).write_text(text.replace('"weight": 0.75', '"weight": 0.7'))
    assert "was changed since it was written" in open_error(folder)
    (folder / MANIFEST).write_text(text)
    edit_manifest(folder, version=2)
    assert "version 2 of the format, this program reads 1" in open_error(folder)


def test_a_missing_shard(folder) -> None:
    (folder / shard_name(0, 1)).unlink()
    assert "tokens-00-00001.safetensors: is missing" in open_error(folder)


def test_a_truncated_shard(folder) -> None:
    path = folder / shard_name(0, 1)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert f"{len(content) - 1:,} bytes, the manifest says {len(content):,}" in open_error(folder)


def test_a_shard_of_another_shape(folder) -> None:
    path = folder / shard_name(0, 0)
    tensors = load_file(path)
    tensors["ids"] = tensors["ids"].view(-1, LENGTH // 2)
    save_file(tensors, path, metadata={"format": "twofour-tokens"})
    size = path.stat().st_size
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sources"][0]["shards"][0]["num_bytes"] = size
    edit_manifest(folder, sources=manifest["sources"])
    assert "its header differs from the manifest" in open_error(folder)
    path.write_bytes(b"\xff" * size)
    assert "its header is not that of a shard" in open_error(folder)


@pytest.mark.parametrize("place", [-1, -500])
def test_an_altered_byte_is_found_by_verify(folder, place) -> None:
    path = folder / shard_name(1, 0)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    store = TokenStore.open(folder)
    with pytest.raises(InputError) as error:
        store.verify_shard(store.sources[1].shards[0])
    assert "tokens-01-00000.safetensors: its SHA-256 changed" in message(error)
    assert not is_whole(folder, store.sources[1].shards[0])
    assert is_whole(folder, store.sources[0].shards[0])


def test_another_tokenizer(folder, tiny_tokenizer) -> None:
    store = TokenStore.open(folder)
    store.check_tokenizer(tiny_tokenizer, "tiny")
    with pytest.raises(InputError) as error:
        store.check_tokenizer(Letters(300), "letters")
    assert "made with another tokenizer" in message(error)
    assert "letters" in message(error)


def test_a_tokenizer_is_the_same_after_it_was_saved(tmp_path, tiny_tokenizer) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.model_max_length = 77  # nothing to do with what it makes of a text
    assert tokenizer_digest(again) == tokenizer_digest(tiny_tokenizer)
    again.add_tokens(["cat sat"])
    assert tokenizer_digest(again) != tokenizer_digest(tiny_tokenizer)


def test_rows_that_are_not_there(folder) -> None:
    store = TokenStore.open(folder)
    for wrong in (-1, len(store)):
        with pytest.raises(InputError, match=f"row {wrong}; it has {len(store)} rows"):
            store.rows([0, wrong])


def test_a_source_without_a_row_makes_no_store(tmp_path, tiny_tokenizer) -> None:
    with pytest.raises(InputError, match="not one row of 20 tokens"):
        write_store(tmp_path / "store", tiny_tokenizer, (["x"],))
    assert not (tmp_path / "store" / MANIFEST).exists()
