"""What the prune stage finds out before its first block, and what the driver says first."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.schema import Config
from jobs.pipeline import PIPELINE
from jobs.runs.models import Models
from jobs.workers.checks import check_inputs
from jobs.workers.prune import Pruning
from sparsify.errors import InputError


def edited(folder: Path, to: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(folder, to)
    path = to / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**load_file(path), **named}, path, metadata={"format": "pt"})
    return to


def test_the_last_block_is_looked_at_before_the_first_is_pruned(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    bad = load_file(tiny_model_dir / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    bad[3, 4] = float("nan")
    dense = edited(tiny_model_dir, tmp_path / "m", model__layers__1__mlp__down_proj__weight=bad)
    context: Any = SimpleNamespace(num_threads=1, world_size=1, rank=0, device="cpu")
    with pytest.raises(InputError, match=r"1 of 8192 values of model\.layers\.1\.mlp\.down_proj"):
        Pruning(context, Config(), dense, tmp_path)


def test_the_driver_says_what_of_a_model_is_left_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    frequencies = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(8)}
    dense = edited(tiny_model_dir, tmp_path / "llama", **frequencies)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {i}." for i in range(40)), encoding="utf-8")
    config = Config()
    config.data.calibration = str(text)
    config.data.sequence_length = 64
    (said,) = check_inputs(config, Models(dense, PIPELINE))
    assert said.startswith("model llama: 1 stored tensors are no part of the model")
    assert check_inputs(config, Models(tiny_model_dir, PIPELINE)) == []
