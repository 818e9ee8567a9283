"""Files and folders are whole or absent, and an error's message is one line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from sparsify.errors import first_line
from sparsify.files import write_json, written_whole
from sparsify.tensors import write_tensors


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"NaN|Out of range|nan"):
        write_json(path, {"a": float("nan")})
    assert path.read_bytes() == before
    write_json(path, [2])
    assert path.read_text() == "[\n  2\n]\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for is_whole in (False, True):
        try:
            with written_whole(path) as temporary:
                temporary.mkdir()  # also where a failed attempt left one
                (temporary / "file").write_text("text")
                assert not path.exists()
                if not is_whole:
                    raise OSError("full")
        except OSError:
            assert not path.exists()
    assert (path / "file").read_text() == "text"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_writer_of_tensors_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    (folder := tmp_path / ".a.safetensors.tmp").mkdir()
    (folder / ".tmpAbC123").write_bytes(b"half of it")
    write_tensors(path, {"a": torch.ones(2)}, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_tensors_may_be_read_by_whom_the_umask_allows(tmp_path: Path, umask: int) -> None:
    path, before = tmp_path / "a.safetensors", os.umask(umask)
    try:
        write_tensors(path, {"a": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  one\n\ttwo"), "one two"),
        (KeyError(), "KeyError"),
        (OSError("\n\nx"), "x"),
    ],
)
def test_an_error_on_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
