"""Sources in parts: wherever the cuts fall, the documents are those of the whole source."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from conf.options.data import DataConfig
from jobs.corpus.builtin import BUILT_IN
from jobs.corpus.file_parts import cut_source, read_part
from jobs.corpus.sources import open_source
from jobs.corpus.text_files import read_source
from sparsify.errors import InputError

MARK = "<|endoftext|>"
TEXTS = {
    "plain": f"one\nmore\n{MARK}\n\n  {MARK} \ntwo {MARK} two\n{MARK}\nthree\n",
    "ends": f"{MARK}\none\n\n{MARK}\n{MARK}\ntwo{MARK}\n{MARK}",
    "none": "\n one document as it is\n\n",
    "other line ends": f"\ufeffone\r\nmore\r\n{MARK}\r\ntwo\r\n\t{MARK}\r\n é \r\n",
    "long lines": f"{'word ' * 40}\n{MARK}\n{'é' * 70}\n{MARK}\nend",
}


def config(**changes) -> DataConfig:
    return DataConfig(sequence_length=16, **changes)


def in_parts(name: Path | str, part_bytes: int, held_out=None, **changes) -> list[list[str]]:
    data = config(**changes)
    shards = cut_source(str(name), held_out, data, part_bytes)
    return [
        [text for part in parts for text in read_part(part, held_out, data)] for parts in shards
    ]


def whole(name: Path | str, **changes) -> list[str]:
    data = config(**changes)
    return list(read_source(str(name), data.text_field, data.separator, BUILT_IN))


def joined(shards: list[list[str]]) -> list[str]:
    return [text for texts in shards for text in texts]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_plain_text_cut_anywhere(tmp_path, text) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    expected = whole(path)
    for part_bytes in range(1, path.stat().st_size + 2):
        shards = in_parts(path, part_bytes)
        assert joined(shards) == expected, part_bytes
        assert len(shards) == -(-path.stat().st_size // part_bytes)


def test_a_separator_of_several_lines_is_not_cut_at(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\n\ntwo\n\n\n\nthree")
    assert in_parts(path, 3, separator="\n\n") == [whole(path, separator="\n\n")]
    assert len(whole(path, separator="\n\n")) == 3


def test_json_lines_cut_anywhere(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": f"é {i} \u2028 " + "x" * (i * 7 % 30)} for i in range(12)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_bytes(("\n".join(lines[:6]) + "\r\n\n" + "\n".join(lines[6:])).encode())
    expected = [record["text"] for record in records]
    for part_bytes in range(1, path.stat().st_size + 2, 3):
        assert joined(in_parts(path, part_bytes)) == expected


def test_a_bad_line_is_named_from_where_counting_began(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' * 10 + "{\n")
    with pytest.raises(InputError, match=r"a.jsonl, line 11: not valid JSON"):
        in_parts(path, 10_000)
    with pytest.raises(InputError, match=r"a.jsonl, line 5 after byte 96: not valid JSON"):
        in_parts(path, 81)


def test_text_that_is_not_utf8_is_named_by_its_byte(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 10 + b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"not UTF-8 at byte 170 \(0xff\)"):
        in_parts(path, 81)


@pytest.mark.parametrize("group_rows", [1, 3, 100])
def test_parquet_cut_in_groups_and_within(tmp_path, group_rows) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    texts = [f"row {i} " + "x" * (i % 5) for i in range(20)]
    table = pyarrow.table({"id": list(range(20)), "body": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=group_rows)
    for part_bytes in (1, 20, 50, 90, 10**6):
        shards = in_parts(path, part_bytes, text_field="body")
        assert joined(shards) == texts
    assert len(shards) == 1
    assert len(in_parts(path, 1, text_field="body")) == 20
    with pytest.raises(InputError, match="no field 'text'; the fields are id, body"):
        in_parts(path, 100)
    path.write_bytes(b"plain")
    with pytest.raises(InputError, match="not valid parquet"):
        in_parts(path, 100)


def test_a_folder_gathers_small_files_and_cuts_large_ones(tmp_path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"file {i}" + f"\n{MARK}\nmore" * (20 * (i == 3)))
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as file:
        file.write('{"text": "last"}\n')
    shards = in_parts(tmp_path, 60)
    assert joined(shards) == whole(tmp_path)
    assert shards[0] == ["file 0", "file 1", "file 2"]
    assert len(shards) > 5
    assert in_parts(tmp_path, 10**6) == [whole(tmp_path)]


def test_a_saved_data_set_is_cut_between_documents(tmp_path) -> None:
    import datasets

    texts = [f"text {i:3}" for i in range(30)]
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": texts})).save_to_disk(
        tmp_path / "set"
    )
    for name in (tmp_path / "set", f"{tmp_path / 'set'}@train"):
        shards = in_parts(name, 80)
        assert joined(shards) == texts
        assert [len(shard) for shard in shards] == [10, 10, 10]


def test_built_in_text_is_cut_between_documents() -> None:
    expected = list(open_source("stdlib", False, config()))
    shards = in_parts("stdlib", 4_000_000, False)
    assert [text for text in joined(shards) if text] == expected
    assert len(shards) > 1


def test_cuts_do_not_depend_on_where_the_files_lie(tmp_path) -> None:
    cuts = []
    for folder in ("a", "b/c"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(5):
            (tmp_path / folder / f"{i}.txt").write_text(f"{MARK}\n".join(["text\n"] * 9 * (i + 1)))
        shards = cut_source(str(tmp_path / folder), None, config(), 200)
        cuts.append([[(p.kind, Path(p.name).name, p.start, p.stop) for p in s] for s in shards])
    assert cuts[0] == cuts[1]


def test_a_missing_source_and_one_that_went_away(tmp_path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        cut_source(str(tmp_path / "nothing.txt"), None, config(), 100)
    path = tmp_path / "a.txt"
    path.write_text("one")
    [[part]] = cut_source(str(path), None, config(), 100)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_part(part, None, config())
