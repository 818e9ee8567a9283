"""Models of the Hugging Face Hub: out of its cache, from a server, and what can go wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from conf.schema import Config, default_run_dir
from jobs.runs.context import fingerprints
from jobs.runs.hub import bytes_to_download, has_weights, model_folder
from jobs.runs.models import find_models
from sparsify.errors import InputError
from sparsify.formats.sparse_folder import hub_reference, model_fingerprint
from sparsify.models.load import check_checkpoint
from tests.conftest import message

COMMIT, LATER = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, offline as all tests are."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE
    return tmp_path / "hub"


def fill(cache: Path, model: Path, commit: str = COMMIT, branch: str = "main") -> Path:
    """Put a model into a cache as the Hub's client does: links to files named by their content."""
    repository = cache / "models--org--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    for path in model.iterdir():
        blob = repository / "blobs" / f"{commit}-{path.name}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return snapshot


def test_a_name_is_a_folder_of_the_cache(cache: Path, tiny_model_dir: Path) -> None:
    snapshot = fill(cache, tiny_model_dir)
    for text in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        folder = model_folder("model.path", text)
        assert folder == snapshot
    check_checkpoint(folder)
    assert hub_reference(folder) == f"org/tiny@{COMMIT}"
    assert hub_reference(tiny_model_dir) is None
    assert bytes_to_download("model.path", folder) == 0


def test_a_folder_of_that_name_comes_first(
    cache: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache, tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert model_folder("model.path", "org/tiny") == tmp_path / "org" / "tiny"


def test_the_commit_counts_wherever_the_cache_lies(tmp_path: Path, tiny_model_dir: Path) -> None:
    first, second = (fill(tmp_path / name, tiny_model_dir) for name in ("a", "b"))
    (second / "consolidated.safetensors").write_bytes(b"another tool's copy")
    assert model_fingerprint(first) == model_fingerprint(second)
    assert fingerprints({"model": first}) == {"model": f"org/tiny@{COMMIT}"}
    moved = fill(tmp_path / "c", tiny_model_dir, LATER)
    assert model_fingerprint(moved) != model_fingerprint(first)


def test_the_dense_model_of_a_run_is_found_in_another_cache(
    cache: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    gone = fill(tmp_path / "old", tiny_model_dir)
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(InputError, match="does not hold all of that model"):
        model_folder("model.teacher", str(gone))
    snapshot = fill(cache, tiny_model_dir)
    assert model_folder("model.teacher", str(gone)) == snapshot


def test_offline_without_it_is_one_line_that_says_what_to_do(cache: Path) -> None:
    for text in ("org/none", "org/none@v1"):
        with pytest.raises(InputError) as error:
            model_folder("model.teacher", text)
        said = message(error)
        assert said.startswith(f"model.teacher={text}: there is no such folder here")
        assert "HF_HUB_OFFLINE is set" in said
        assert "hf download org/none" in said


def test_what_is_no_name_of_the_hub_is_a_folder(cache: Path, tmp_path: Path) -> None:
    for text in ("none", "/no/such/folder", "a/b/c", "./a/b", "../a/b"):
        assert not model_folder("model.path", text).exists()
    with pytest.raises(InputError, match=r"model\.path=x+: cannot be read \(File name too long"):
        model_folder("model.path", "x" * 300)


class Hub:
    """The Hub's client, with a repository of its own; notes what it was asked for."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self._repository = repository
        self._cache = cache
        self.asked: list[tuple[str | None, list[str]]] = []

    def __call__(self, name, *, revision, allow_patterns, dry_run=False):
        self.asked.append((revision, allow_patterns))
        folder = self._cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        files = [
            path for pattern in allow_patterns for path in sorted(self._repository.glob(pattern))
        ]
        if dry_run:
            return [
                SimpleNamespace(file_size=path.stat().st_size, will_download=True) for path in files
            ]
        for path in files:
            shutil.copyfile(path, folder / path.name)
        return str(folder)


@pytest.fixture
def sharded(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A repository with the weights as its index says, and beside them what nobody reads."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "repository"))
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    index = {"weight_map": {"lm_head.weight": "part-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "modeling.py"):
        (folder / name).write_text("not wanted")
    return folder


def test_only_what_a_model_is_read_from_is_downloaded(
    sharded: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(sharded, cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    described = model_folder("model.path", "org/model@v2", fetch=False)
    assert not has_weights(described)
    size = (sharded / "part-1.safetensors").stat().st_size
    assert bytes_to_download("model.path", described) == size
    folder = model_folder("model.path", "org/model@v2")
    assert has_weights(folder)
    check_checkpoint(folder)
    unwanted = {"consolidated.safetensors", "pytorch_model.bin", "README.md", "modeling.py"}
    assert not unwanted & {path.name for path in folder.iterdir()}
    assert hub.asked[-1] == (COMMIT, ["part-1.safetensors"]), "the same commit, if the branch moves"


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (errors.GatedRepoError, ["granted", "accept its terms", "hf auth login"]),
        (errors.RepositoryNotFoundError, ["no such folder here", "no such model", "HF_TOKEN"]),
        (errors.RevisionNotFoundError, ["no such branch, tag or commit"]),
        (errors.HfHubHTTPError, ["cannot be downloaded", "said so"]),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: type, parts: list[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        refusal = error.__new__(error)
        refusal.args = ("said\nso",)
        raise refusal

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError) as caught:
        model_folder("model.path", "org/model")
    assert all(part in message(caught) for part in ["model.path=org/model", *parts])


def test_a_run_starts_from_it_and_is_named_after_it(cache: Path, tiny_model_dir: Path) -> None:
    snapshot = fill(cache, tiny_model_dir)
    config = Config()
    config.model.path = "org/tiny"
    assert find_models(config, cache / "run", ()).dense == snapshot
    assert default_run_dir(config) == "runs/tiny-2-4-twofour"
    config.model.path = "org/tiny@refs/pr/1"
    assert default_run_dir(config) == "runs/tiny-refs-pr-1-2-4-twofour"
