"""The hidden states between two blocks, where there are none."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from sparsify.calibration import hidden_states
from sparsify.calibration.hidden_states import HiddenStateStore


def test_a_model_of_one_block_has_nothing_to_drop(tmp_path: Path) -> None:
    store = HiddenStateStore("device", "cpu", tmp_path / "streams")
    store.drop(1)
    assert not (tmp_path / "streams").exists()


def test_states_from_disk_come_to_the_device_of_this_process(tmp_path: Path, monkeypatch) -> None:
    """safetensors takes "cuda" for the first GPU of all, so it is not told of a device."""
    asked = []

    def load(path: Path, **options: object) -> dict[str, torch.Tensor]:
        asked.append(options)
        return load_file(path)

    monkeypatch.setattr(hidden_states, "load_file", load)
    store = HiddenStateStore("disk", "meta", tmp_path)
    store.put("pruned", 0, torch.ones(1, 2, 3), block=1)
    assert store.get("pruned", 0).device.type == "meta"
    assert asked == [{}]
