"""How fast exported folders answer: which are timed, what is counted, and what is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.workers import speed
from sparsify.formats.kinds.packed import save_packed_folder
from sparsify.models.load import load_pair
from sparsify.models.masked import apply_masks_, infer_masks
from sparsify.packed.layout import Layer, Scheme
from sparsify.pattern import Pattern

WORKER: Any = SimpleNamespace(device="cpu")


@pytest.fixture
def packed(tiny_model_dir: Path, tmp_path: Path) -> Path:
    model, tokenizer = load_pair(tiny_model_dir)
    pattern = Pattern.parse("2:4")
    masks = infer_masks(model, pattern, may_be_dense=True)
    apply_masks_(model, masks)
    folder = tmp_path / "sparse-packed"
    save_packed_folder(folder, model, tokenizer, masks, pattern, {}, tiny_model_dir)
    return folder


def test_dense_and_packed_folders_take_turns(
    tiny_model_dir: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_LAYER", (64, 128))
    found = speed.measure_speed(WORKER, tiny_model_dir, [tiny_model_dir, packed], "float32", 1.0)
    assert found is not None
    dense, sparse = found["models"]
    assert (dense["name"], sparse["name"]) == ("dense", "sparse-packed")
    model, _ = load_pair(tiny_model_dir)
    assert dense["num_bytes"] == sum(p.nbytes for p in model.parameters())
    assert sparse["num_bytes"] < dense["num_bytes"]
    assert all(row["first_token_s"] > 0 and row["token_s"] is not None for row in found["models"])
    sides = {side["name"]: side["num_bytes"] for side in found["layer"]["sides"]}
    assert sides == {
        "dense float32": 64 * 128 * 4, "dense bfloat16": 64 * 128 * 2,
        "2:4 bfloat16": 64 * 128 * 9 // 8, "2:4 FP8": 64 * 128 * 5 // 8 + 64 * 4,
        "2:4 INT8": 64 * 128 * 5 // 8 + 64 * 2, "2:4 INT4": 64 * 128 * 3 // 8 + 64 * 2,
    }  # fmt: skip


def test_a_large_model_is_not_loaded_for_it(tiny_model_dir: Path) -> None:
    num_bytes = sum(path.stat().st_size for path in tiny_model_dir.glob("*.safetensors"))
    below = (num_bytes - 1) / 1e9
    assert speed.measure_speed(WORKER, tiny_model_dir, [], "float32", below) is None


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("fp8"), Scheme("int", 4, 32)])
def test_the_random_layer_computes(scheme: Scheme) -> None:
    """Positions that rise in their group, and values that are numbers: kernels take it."""
    module = speed.random_packed(Layer((16, 64), scheme, Pattern.parse("2:4")))
    assert bool(module.dense_weight(torch.float32).isfinite().all())
    counts = (module.dense_weight(torch.float32).view(16, 16, 4) != 0).sum(-1)
    assert int(counts.max()) == 2 and float(counts.float().mean()) > 1.7
    assert bool(module(torch.randn(3, 64)).isfinite().all())
