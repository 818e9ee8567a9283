"""Encodings, halves of characters, rows without text, and texts that are never held whole."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from conf.options.data import DataConfig
from jobs.corpus import content, text_files
from jobs.corpus.builtin import BUILT_IN
from jobs.corpus.documents import Documents
from jobs.corpus.file_parts import cut_source, read_part
from jobs.corpus.rows import load_rows
from jobs.corpus.sources import open_source
from jobs.corpus.text_files import read_source
from sparsify.data import split
from sparsify.errors import InputError
from tests.conftest import message

MARK = "<|endoftext|>"


def read(path: Path, field: str = "text") -> Documents:
    return read_source(str(path), field, MARK, BUILT_IN)


# --- encodings -------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_byte_order_mark_says_how_to_decode(tmp_path: Path, encoding: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    text = {".txt": "é one", ".jsonl": '{"text": "é one"}\n', ".csv": "text\né one\n"}[suffix]
    path.write_bytes(text.encode(encoding))
    found = read(path)
    assert list(found) == ["é one"]
    is_said = "files decoded from UTF-16 or UTF-32, as their byte order marks say: 1" in "".join(
        found.remarks.lines()
    )
    assert is_said == (encoding != "utf-8-sig")
    parts = cut_source(str(path), None, DataConfig(), 10)
    assert [t for ps in parts for p in ps for t in read_part(p, None, DataConfig())] == ["é one"]


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        ("word " * 2000 + "é", "byte 10000 (0xe9)"),
        ("a" * 4 + "ü", "byte 4 (0xfc)"),
    ],
)
def test_latin_1_is_refused_with_its_byte(tmp_path: Path, raw: str, place: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw.encode("latin-1"))
    with pytest.raises(InputError) as error:
        list(read(path))
    assert f"{path}: not UTF-8 at {place}" in message(error)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_utf_16_without_a_mark_is_refused(tmp_path: Path, encoding: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes('{"text": "some words"}\n'.encode(encoding))
    with pytest.raises(InputError, match=r"not UTF-8 at byte [01] \(0x00\), but perhaps UTF-16"):
        read(path)


def test_a_mark_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("abc".encode("utf-16") + b"\x00")
    with pytest.raises(InputError, match="not UTF-16 at byte 8, though"):
        read(path)


# --- rows ------------------------------------------------------------------------------------


def write_rows(path: Path, texts: list[str | None]) -> Path:
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]] = [{"n": i, "text": text} for i, text in enumerate(texts)]
    if path.suffix in (".jsonl", ".json"):
        path.write_text(
            json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
        )
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["n", "text"])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(
            sink, table.schema
        ) as out:  # fmt: skip
            out.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_rows_without_text_are_passed_over_and_counted(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"a{suffix}", ["null", None, "", "two", *[None] * 3])
    found = read(path)
    assert list(found) == ["null", "two"]
    assert len(found) == 2, "before anything is put into an order"
    (line,) = found.remarks.lines()
    first = {".jsonl": "line 2", ".json": "item 1", ".csv": "line 3"}.get(suffix, "row 1")
    assert line.startswith(f"rows without text (null or empty), passed over: 5 (a{suffix}, {first}")
    assert line.endswith(", ...)")
    data = DataConfig()
    parts = cut_source(str(path), None, data, 20)
    assert [t for ps in parts for p in ps for t in read_part(p, None, data)] == ["null", "two"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_of_a_surrogate_pair_is_replaced_and_said(
    tmp_path: Path, tiny_tokenizer, suffix: str
) -> None:
    path = write_rows(tmp_path / f"a{suffix}", ["one \ud83d end " * 20, "two 😀", "three"])
    found = read(path)
    assert list(found) == ["one \ufffd end " * 20, "two 😀", "three"]
    assert [line.partition(" (")[0] for line in found.remarks.lines()] == [
        "rows with half of a surrogate pair, read as U+FFFD: 1"
    ]
    data = DataConfig(calibration=str(path), sequence_length=16)
    assert len(load_rows(data, "train", tiny_tokenizer, 2, 0)[0]) == 2


def test_parquet_that_is_not_utf8_or_no_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    raw = pyarrow.array([b"one", b"\xff\xfe"], pyarrow.binary())
    bad = pyarrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": bad, "raw": raw}), path)
    with pytest.raises(InputError, match=r"a.parquet, row 1: not UTF-8 at byte 0 of the text"):
        list(read(path))
    with pytest.raises(InputError, match="field 'raw' is binary, not a string"):
        read(path, "raw")


# --- size ------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 1000)
    monkeypatch.setattr(text_files, "_EDGE_BYTES", 100)
    monkeypatch.setattr(split, "LONG_BYTES", 500)


LONG_TEXTS = {
    "lines": "".join(f"line {i} of it\n" for i in range(700)),
    "words": " ".join(f"word{i}" for i in range(900)),
    "one word": "x" * 7000,
    "other letters": "你好" * 1500,
    "between others": f"one\n{MARK}\n{'some words ' * 500}\n{MARK}\n\n{MARK}\ntwo {MARK} end",
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_a_long_document_comes_in_pieces_wherever_the_file_is_cut(
    tmp_path: Path, small_pieces, kind: str
) -> None:
    path, text = tmp_path / "a.txt", LONG_TEXTS[kind]
    path.write_text(text, encoding="utf-8")
    found = read(path)
    pieces = list(found)
    assert len(pieces) > 4
    assert max(len(piece.encode()) for piece in pieces) < 2000
    (line,) = found.remarks.lines()
    assert line.startswith("documents of 32 MiB or more, read in pieces")
    if MARK not in text:
        assert "".join(pieces) == text
    data = DataConfig()
    for part_bytes in (300, 1000, 1500, 5000, 10**6):
        shards = cut_source(str(path), None, data, part_bytes)
        assert [t for ps in shards for p in ps for t in read_part(p, None, data)] == pieces
    held, rest = (list(open_source(str(path), side, data)) for side in (True, False))
    long = [piece for piece in pieces if len(piece.encode()) >= 500]
    assert all(piece[int(len(piece) * 0.9) :] in held for piece in long), "the end of every piece"
    assert sum(map(len, held + rest)) == sum(map(len, pieces))


def test_a_text_is_never_read_whole(tmp_path: Path, small_pieces, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word " * 20_000)
    read_at_once = []
    whole = content.Content.read
    monkeypatch.setattr(
        content.Content, "read",
        lambda self, begin, end: read_at_once.append(end - begin) or whole(self, begin, end),
    )  # fmt: skip
    monkeypatch.setattr(content, "_BLOCK_BYTES", 3000)
    monkeypatch.setattr(content, "_HEAD_BYTES", 3000)
    assert len(list(read(path))) == 99
    assert max(read_at_once) < 5000


def test_separators_are_found_across_blocks(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"one\n {MARK}{' ' * 200}\r\ntwo{MARK}\n{MARK}{MARK}\n\t{MARK}\nthree\n{MARK}")
    expected = ["one", f"two{MARK}\n{MARK}{MARK}", "three"]
    for block in range(1, 60):
        monkeypatch.setattr(content, "_BLOCK_BYTES", block)
        assert list(read(path)) == expected
