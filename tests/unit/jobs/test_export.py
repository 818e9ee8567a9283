"""Exported folders are named, and described, by what is in them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sparsify.formats.packed_folder import save_packed_folder

from conf.schema import Config
from jobs.workers.export import export_on_worker, model_card
from sparsify.formats.sparse_folder import MASKS, write_sparsity
from sparsify.masks.storage import save_masks
from sparsify.models.load import load_pair
from sparsify.models.masked import apply_masks_, infer_masks
from sparsify.models.save import save_model
from sparsify.pattern import Pattern


@pytest.fixture(scope="module")
def sparse(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model, and beside it the same packed."""
    folder = tmp_path_factory.mktemp("sparse")
    model, tokenizer = load_pair(tiny_model_dir)
    pattern = Pattern.parse("2:4")
    masks = infer_masks(model, pattern, may_be_dense=True)
    apply_masks_(model, masks)
    save_model(model, tokenizer, folder / "model")
    save_masks(folder / "model" / MASKS, masks)
    write_sparsity(folder / "model", masks, "2:4", "magnitude", {})
    save_packed_folder(folder / "packed", model, tokenizer, masks, pattern, None, folder / "model")
    return folder


@pytest.mark.parametrize(("bits", "integers"), [(4, "int4"), (8, "int8"), (None, None)])
def test_the_quantised_folder_is_named_by_its_bits(
    sparse: Path, tiny_model_dir: Path, tmp_path: Path, bits: int | None, integers: str | None
) -> None:
    payload = {
        "config": Config(), "name": "recovered", "source": sparse / "model",
        "dense": tiny_model_dir, "folder": tmp_path, "results": [], "bits": bits,
        "packed": None if bits is None else sparse / "packed",
    }  # fmt: skip
    context: Any = SimpleNamespace(num_threads=1)
    found = export_on_worker(context, payload)
    assert list(found["packed_bytes"]) == ["recovered"]
    folders = {path.name for path in tmp_path.iterdir()}
    expected = {"sparse", "sparse-packed"} | ({f"{integers}-packed"} if integers else set())
    assert folders == expected
    for folder in folders:
        card = (tmp_path / folder / "README.md").read_text(encoding="utf-8")
        assert ("INT" in card) == folder.startswith("int")
        if integers and folder.startswith("int"):
            assert f"in {integers.upper()}, only the kept values" in card
            assert f'load_packed("{folder}/model.packed.safetensors")' in card


def test_only_the_dense_folder_loads_like_any_other() -> None:
    given: Any = (None, "llama", [], "2:4", {})
    assert 'from_pretrained("sparse")' in model_card("sparse", *given)
    assert 'load_packed("sparse-packed/' in model_card("sparse-packed", *given)
