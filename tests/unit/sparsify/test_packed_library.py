"""The kernels' library: compiled once, alone in the user's folder, and missed with words."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsify.kernels.cpu import library
from sparsify.kernels.cpu.library import LibraryError, load, use_folder
from sparsify.kernels.cpu.linear import available_paths
from tests.numerics.test_packed_linear import assert_close, random_layer

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _defaults_again() -> Iterator[None]:
    yield
    use_folder(None)


def compiler(folder: Path, body: str) -> str:
    """A script that stands for a compiler; it may call the real one, unoptimised to be quick."""
    real = shutil.which("c++")
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body.replace('REAL', f'{real} -O0')}\n")
    path.chmod(0o755)
    return str(path)


def assert_falls_back(words: str) -> None:
    """One warning with these words, once; then the right result from PyTorch."""
    layer, inputs = random_layer("int4", 9, 68, 32), torch.randn(2, 68)
    with pytest.warns(RuntimeWarning, match=words) as caught:
        output = layer(inputs)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert "layers run in PyTorch" in str(caught[0].message)
    assert_close(output, inputs, layer, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(inputs), output)
    assert available_paths() == ("torch",)


class TestMissing:
    def test_no_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        use_folder(tmp_path / "cache")
        assert_falls_back("no C\\+\\+ compiler .* install one")

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        use_folder(tmp_path / "cache", str(tmp_path / "c++"))
        assert_falls_back("cannot be run .*No such file")

    def test_one_that_fails(self, tmp_path: Path) -> None:
        body = (
            'case "$1" in --version) ;; *) echo "a: fatal error: no space left" >&2; exit 1;; esac'
        )
        use_folder(tmp_path / "cache", compiler(tmp_path, body))
        assert_falls_back("failed .*no space left")
        assert not list((tmp_path / "cache").iterdir())

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        use_folder(tmp_path / "file" / "cache")
        assert_falls_back("cannot be made .*use_folder")

    def test_a_folder_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(**_: object) -> str:  # modes do not stop root, who may run this
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(library.tempfile, "mkdtemp", refuse)
        use_folder(tmp_path / "cache")
        assert_falls_back("cannot be written .*Read-only file system.*use_folder")

    def test_a_folder_that_others_can_write(self, tmp_path: Path) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
        use_folder(tmp_path / "cache")
        assert_falls_back("others can write to .*chmod 700")


def test_built_by_two_processes_at_once_and_without_openmp(tmp_path: Path) -> None:
    body = 'case "$*" in *-fopenmp*) exit 1;; esac; exec REAL "$@" -O0'
    words, folder = compiler(tmp_path, body), tmp_path / "cache"
    code = f"""
from pathlib import Path
from sparsify.kernels.cpu.library import load
found = load(Path({str(folder)!r}), {words!r})
print(found.has_threads, found.paths[0], found.file)
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]  # fmt: skip
    said = {child.communicate(timeout=300)[0] for child in running}
    (file,) = folder.iterdir()
    assert said == {f"False plain {file}\n"}
    assert folder.stat().st_mode & 0o777 == 0o700 and not file.stat().st_mode & 0o077

    written_ns = file.stat().st_mtime_ns
    use_folder(folder, words)
    layer, inputs = random_layer("int8", 30, 132, 32), torch.randn(3, 132)
    with pytest.warns(RuntimeWarning, match="has no OpenMP: packed layers run on one thread"):
        assert_close(layer(inputs), inputs, layer, None)
    for path in available_paths():  # unoptimised, too
        assert_close(layer(inputs, None, path), inputs, layer, None)
    assert file.stat().st_mtime_ns == written_ns

    file.chmod(0o722)
    with pytest.raises(LibraryError, match="is not this user's alone; delete it"):
        load(folder, words)
    file.unlink()
    (tmp_path / "elsewhere.so").write_bytes(b"somebody else's")
    file.symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(LibraryError, match="is not this user's alone; delete it"):
        load(folder, words)
    other = tmp_path / "other"  # the loader knows a path that it has loaded from
    other.mkdir(mode=0o700)
    (other / file.name).write_bytes(b"no library")
    with pytest.raises(LibraryError, match=r"cannot be loaded .*; delete it"):
        load(other, words)
