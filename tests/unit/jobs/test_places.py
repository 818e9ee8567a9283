"""What names of sources mean, and which files a folder is."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from conf.options.data import DataConfig
from jobs.corpus.builtin import BUILT_IN
from jobs.corpus.places import full_name
from jobs.corpus.sources import open_source, with_absolute_paths
from jobs.corpus.survey import Texts
from jobs.corpus.text_files import read_source
from sparsify.errors import InputError
from tests.conftest import message


def lines(*texts: str | None) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(name: Path | str) -> list[str]:
    return list(read_source(str(name), "text", "<|endoftext|>", BUILT_IN))


def remarks(name: Path | str) -> list[str]:
    return read_source(str(name), "text", "<|endoftext|>", BUILT_IN).remarks.lines()


def test_a_folder_is_all_its_text_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    """Like C4 as it is downloaded: JSON lines under the name .json.gz, and a dataset card."""
    c4 = tmp_path / "c4"
    (c4 / "en" / "more").mkdir(parents=True)
    (c4 / "en" / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(lines("one", "two")))
    (c4 / "en" / "more" / "3.jsonl.xz").write_bytes(lzma.compress(lines("three")))
    (c4 / "en" / "more" / "4.json.bz2").write_bytes(bz2.compress(b'[{"text": "four"}]'))
    (c4 / "en" / "more" / "5.ndjson").write_bytes(lines("five"))
    for name in ("README.md", "LICENSE", "LICENSE-MIT.txt", "dataset_infos.json"):
        (c4 / name).write_text("about")
    (c4 / ".git").mkdir()
    (c4 / ".git" / "x.txt").write_text("hidden")
    (c4 / "picture.png").write_bytes(b"")
    assert read(c4) == ["one", "two", "three", "four", "five"]
    (line,) = remarks(c4)
    assert line.startswith("files left out: 6 (.git: hidden, LICENSE: not a format that is read, ")
    assert "LICENSE-MIT.txt: about the data, ...)" in line
    data = DataConfig(calibration=str(c4))
    assert Texts(data).remarks("heldout") == [f"data.calibration={c4}: {line}"]
    assert read(c4 / "README.md") == ["about"], "a file that is named is read"


def test_zstandard(tmp_path: Path) -> None:
    import pyarrow

    path = tmp_path / "a.jsonl.zst"
    parts = [lines("one", "two"), lines("three")]
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(parts[0])
    assert read(path) == ["one", "two"]
    frames = path.read_bytes()
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(parts[1])
    path.write_bytes(frames + path.read_bytes())
    assert read(path) == ["one", "two", "three"], "frames one after another"


def test_folders_behind_links_are_read_and_circles_end(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "else where"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "0.txt").write_text("one")
    (elsewhere / "1.txt").write_text("two")
    (folder / "more").symlink_to("../else where")
    (folder / "self").symlink_to(".")
    assert read(folder) == ["one", "two"]
    assert remarks(folder) == ["files left out: 1 (self: read already, behind another link)"]
    (folder / "gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(InputError, match=r"gone.txt is a link to nothing \(nowhere.txt\)"):
        read(folder)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    closed = tmp_path / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # chmod would not stop the root user
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert f"{closed}: cannot be read ([Errno 13] Permission denied" in message(error)


def test_a_home_folder_and_names_with_spaces(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my texts").mkdir()
    (tmp_path / "my texts" / "a b.txt").write_text("one")
    assert read("~/my texts") == read("~/my texts/a b.txt") == ["one"]
    with pytest.raises(InputError, match=r"close to it: .*/my texts"):
        read("~/my text")
    data = DataConfig(mix=["1 ~/my texts", "2 stdlib"], heldout="~/my texts/a b.txt")
    given = with_absolute_paths(data)
    assert given.mix == [f"1 {tmp_path}/my texts", "2 stdlib"]
    assert given.heldout == f"{tmp_path}/my texts/a b.txt"
    data = DataConfig(calibration="~/my texts", heldout=str(tmp_path / "my texts"))
    with pytest.raises(InputError, match="the same source"):
        list(Texts(data).remarks("heldout"))


def test_a_split_of_a_folder_keeps_it_from_the_root(tmp_path: Path, monkeypatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    one = datasets.Dataset.from_dict({"text": ["one", None, "", "two"]})
    datasets.DatasetDict(test=one).save_to_disk("set")
    given = with_absolute_paths(DataConfig(calibration="set@test"))
    assert given.calibration == f"{tmp_path}/set@test"
    monkeypatch.chdir("/")
    assert list(open_source(given.calibration, None, given)) == ["one", "two"]
    assert remarks(given.calibration) == [
        "rows without text (null or empty), passed over: 2 (row 1, row 2)"
    ]


@pytest.mark.parametrize(
    "name", ["wikitext", "org/name", "wikitext:wikitext-2-raw-v1@test", "allenai/c4:en@train[:1%]"]
)
def test_what_is_no_path_is_a_data_set_of_the_hub(name: str) -> None:
    assert full_name(name, BUILT_IN) == f"hf:{name}"
    with pytest.raises(InputError) as error:
        read(name)
    text = message(error)
    assert f"data source hf:{name}: no such file or folder, and as a data set of the Hub" in text


@pytest.mark.parametrize("name", ["stdlib", "hf:x", "x.txt", "/a/b", "./x", "../x/y", "stdlob"])
def test_what_is_clearly_something_else_is_not(name: str) -> None:
    assert full_name(name, BUILT_IN) in (name, str(Path(name)))


def test_a_name_in_a_folder_that_is_there_is_a_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert full_name("data/texts", BUILT_IN) == "data/texts"
    assert full_name("other/texts", BUILT_IN) == "hf:other/texts"
    with pytest.raises(InputError, match=r"no such file.*hf:data/texts"):
        read("data/texts")
    (tmp_path / "wikitext").write_text("one")
    assert full_name("wikitext", BUILT_IN) == "wikitext"
