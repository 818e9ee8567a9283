"""Tokenising into a store: what is in it, going on after a kill, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.options.data import DataConfig
from conf.options.model import ModelConfig
from conf.options.tokenize import TokenizeConfig, TokenizeJobConfig
from jobs.corpus.sources import open_source
from jobs.workers import tokenize as _tokenize
from sparsify.data.rows import TokenRows, token_rows
from sparsify.data.shards import MANIFEST
from sparsify.data.split import is_held_out, split_document
from sparsify.data.store import TokenStore
from sparsify.errors import InputError

STORIES = [f"Story {i}: " + "the cat sat on the mat. " * (i % 7 + 1) for i in range(120)]
SHARD_BYTES = 2500
LENGTH = 16


class Told:
    """A display that keeps what it is told."""

    def __init__(self):
        self.lines: list[str] = []

    def start_stage(self, name):
        self.lines.append(name)

    def finish_stage(self, name, text):
        self.lines.append(text)

    def say(self, text):
        self.lines.append(text)

    def on_event(self, event):
        self.lines.append(event["text"])


class Context:
    num_threads = 1


def in_process(work, payloads):
    for payload in payloads:
        work(Context(), payload)


@pytest.fixture
def stories(tmp_path) -> Path:
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    return path


@pytest.fixture
def parquet(tmp_path) -> Path:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "backwards.parquet"
    table = pyarrow.table({"text": [story[::-1] for story in STORIES]})
    pyarrow.parquet.write_table(table, path, row_group_size=25)
    return path


@pytest.fixture
def job(stories, parquet, tiny_model_dir) -> TokenizeJobConfig:
    return TokenizeJobConfig(
        model=ModelConfig(path=str(tiny_model_dir)),
        data=DataConfig(
            calibration=str(stories), mix=[f"3 {stories}", f"1 {parquet}"],
            sequence_length=LENGTH, heldout_share=0.2,
        ),
        tokenize=TokenizeConfig(shard_bytes=SHARD_BYTES),
    )  # fmt: skip


def write(config, folder, map_shards=in_process) -> list[str]:
    folder.mkdir(exist_ok=True)
    told = Told()
    _tokenize.write_store(config, folder, map_shards, told)
    return told.lines


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_rows(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    rows = store.rows(range(len(store)))
    return list(zip(rows.ids_NT.tolist(), rows.positions_NT.tolist(), strict=True))


def test_the_store_holds_the_documents_that_training_may_use(job, tmp_path, tiny_tokenizer) -> None:
    write(job, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    for shard in store.shards:
        store.verify_shard(shard)
    assert [source.name for source in store.sources] == ["stories.jsonl", "backwards.parquet"]
    assert [source.weight for source in store.sources] == [0.75, 0.25]
    assert all(len(source.shards) > 3 for source in store.sources)
    assert store.sequence_length == LENGTH
    for source, name in zip(store.sources, [e.split(" ")[1] for e in job.data.mix], strict=True):
        texts = list(open_source(name, False, job.data))
        assert sum(shard.num_documents for shard in source.shards) == len(texts) < len(STORIES)
        num_tokens = token_rows(texts, tiny_tokenizer, 2).num_tokens
        dropped = sum(shard.num_dropped_tokens for shard in source.shards)
        assert source.num_tokens + dropped - num_tokens in (0, 1)  # rows of two drop an odd one
    first = next(text for text in STORIES if not is_held_out(text, 0.2))
    ids, _ = all_rows(store)[0]
    assert first.startswith(tiny_tokenizer.decode(ids))


def test_one_shard_gives_the_rows_of_token_rows(job, stories, tmp_path, tiny_tokenizer) -> None:
    data = replace(job.data, mix=[])
    whole = replace(job, data=data, tokenize=TokenizeConfig(shard_bytes=10**9))
    write(whole, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    texts = open_source(str(stories), False, data)
    expected = token_rows(texts, tiny_tokenizer, LENGTH)
    found = store.rows(range(len(store)))
    assert torch.equal(found.ids_NT, expected.ids_NT)
    assert torch.equal(found.positions_NT, expected.positions_NT)


def test_held_out_text_of_another_source_is_left_out(job, stories, tmp_path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES[:30]))
    data = replace(job.data, mix=[], train=str(stories), heldout=str(heldout))
    write(replace(job, data=data), tmp_path / "store")
    [source] = TokenStore.open(tmp_path / "store").sources
    assert sum(shard.num_documents for shard in source.shards) == 90


def test_of_few_documents_the_ends_are_held_out(job, tmp_path, tiny_tokenizer) -> None:
    path = tmp_path / "books.txt"
    books = ["word " * 300, "other " * 400]
    path.write_text("\n<|endoftext|>\n".join(books))
    data = replace(job.data, mix=[], calibration=str(path))
    config = replace(job, data=data, tokenize=TokenizeConfig(shard_bytes=10**9))
    write(config, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    expected = token_rows(
        (split_document(book, False, 0.2, True) for book in books), tiny_tokenizer, LENGTH
    )
    assert torch.equal(store.rows(range(len(store))).ids_NT, expected.ids_NT)


def test_bytes_do_not_depend_on_the_order_of_the_work_or_on_places(job, tmp_path) -> None:
    def backwards(work, payloads):
        in_process(work, payloads[::-1])

    write(job, tmp_path / "first")
    (tmp_path / "else").mkdir()
    paths = [Path(entry.split(" ")[1]) for entry in job.data.mix]
    for path in paths:
        (tmp_path / "else" / path.name).write_bytes(path.read_bytes())
    moved = replace(
        job.data,
        mix=[f"{w} {tmp_path / 'else' / p.name}" for w, p in zip((3, 1), paths, strict=True)],
        calibration=str(tmp_path / "else" / paths[0].name),
    )
    write(replace(job, data=moved), tmp_path / "second", backwards)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert str(tmp_path) not in (tmp_path / "first" / MANIFEST).read_text()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("phase", ["write_tensors", "before record", "write_manifest"])
@pytest.mark.parametrize("num_whole", [0, 1, 4])
def test_killed_anywhere_and_started_again(job, tmp_path, monkeypatch, phase, num_whole) -> None:
    from sparsify.data import store_write

    write(job, tmp_path / "undisturbed")
    calls = []

    def kill_in(module, name, after=num_whole):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            calls.append(name)
            if len(calls) > after:
                if name == "write_tensors":  # half a file under its temporary name
                    args[0].with_name(f".{args[0].name}.tmp").write_bytes(b"half")
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    if phase == "write_manifest":
        kill_in(_tokenize, "write_manifest", after=0)
    elif phase == "before record":
        kill_in(_tokenize, "write_record")
    else:
        kill_in(store_write, "write_tensors")
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        write(job, folder)
    assert not (folder / MANIFEST).exists()
    with pytest.raises(InputError, match="not finished"):
        TokenStore.open(folder)
    monkeypatch.undo()
    made = []

    def counting(work, payloads):
        made.extend(payload.file for payload in payloads)
        in_process(work, payloads)

    write(job, folder, counting)
    assert contents(folder) == contents(tmp_path / "undisturbed")
    num_shards = len(list(folder.glob("tokens-*")))
    assert len(made) == (0 if phase == "write_manifest" else num_shards - num_whole)


def test_a_finished_store_is_left_alone(job, tmp_path) -> None:
    def never(work, payloads):
        raise AssertionError("nothing is left to do")

    write(job, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    write(job, tmp_path / "store", never)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == before


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_shard_of_a_finished_store_is_made_again(job, tmp_path, damage) -> None:
    folder = tmp_path / "store"
    write(job, folder)
    before = contents(folder)
    path = sorted(folder.glob("tokens-*"))[2]
    if damage == "remove":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 255
        path.write_bytes(content if damage == "flip" else content[:-5])
    made = []

    def counting(work, payloads):
        made.extend(payload.file for payload in payloads)
        in_process(work, payloads)

    write(job, folder, counting)
    assert made == [path.name]
    assert contents(folder) == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_store_of_something_else_is_refused(job, stories, tmp_path, is_finished) -> None:
    folder = tmp_path / "store"

    def stop(work, payloads):
        in_process(work, payloads[:2])
        raise Killed

    if is_finished:
        write(job, folder)
    else:
        with pytest.raises(Killed):
            write(job, folder, stop)
    before = contents(folder) if is_finished else None
    shorter = replace(job, data=replace(job.data, sequence_length=8))
    with pytest.raises(InputError, match=r"sequence_length: 16 -> 8.*another tokenize.out="):
        write(shorter, folder)
    stories.write_text(stories.read_text() + '{"text": "one more"}\n')
    with pytest.raises(InputError, match=r"sources.stories.jsonl.fingerprint"):
        write(job, folder)
    if before is not None:
        assert contents(folder) == before


def test_a_folder_with_other_files_is_refused(job, tmp_path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("text")
    with pytest.raises(InputError, match="holds other files and no store"):
        write(job, folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_store_is_no_text(job, tmp_path) -> None:
    write(job, tmp_path / "store")
    again = replace(job, data=replace(job.data, mix=[], train=str(tmp_path / "store")))
    with pytest.raises(InputError, match="is a token store already"):
        write(again, tmp_path / "other")


def test_many_dropped_tokens_are_told(job, tmp_path) -> None:
    small = replace(job, tokenize=TokenizeConfig(shard_bytes=1200))  # a few rows a shard
    lines = write(small, tmp_path / "store")
    assert any("after the last whole row of a shard" in line for line in lines)
    large = replace(job, tokenize=TokenizeConfig(shard_bytes=10**9))
    assert not any("after the last" in line for line in write(large, tmp_path / "large"))


def test_too_little_text_makes_no_store(job, tmp_path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("cat")
    config = replace(job, data=replace(job.data, mix=[], calibration=str(path)))
    with pytest.raises(InputError, match=r"short.txt: not one row of 16 tokens"):
        write(config, tmp_path / "store")


def test_rows_in_training_order_come_from_both_sources(job, tmp_path) -> None:
    write(job, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    order = store.order(seed=0)
    rows: TokenRows = store.rows(order.batch(0, 40))
    assert rows.ids_NT.shape == (40, LENGTH)
    assert torch.bincount(order.places(range(1000)).source_N).tolist() == [750, 250]


def test_rows_without_text_are_said_and_noted(job, stories, tmp_path) -> None:
    whole = replace(job, data=replace(job.data, mix=[], calibration=str(stories)))
    write(whole, tmp_path / "whole")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": null}\n' + stories.read_text())
    told = write(
        replace(whole, data=replace(whole.data, calibration=str(bad))), tmp_path / "left out"
    )
    line = "bad.jsonl: rows without text (null or empty), passed over: 1 (bad.jsonl, line 1)"
    assert line in told
    manifests = [TokenStore.read_manifest(tmp_path / name) for name in ("whole", "left out")]
    assert "warnings" not in manifests[0]
    assert manifests[1]["warnings"] == [line]
    prints = [manifest["sources"][0]["fingerprint"] for manifest in manifests]
    assert prints[0] == prints[1], "the same text"
