"""The hidden states between two blocks, where there are none."""

from __future__ import annotations

from pathlib import Path

from sparsify.calibration.hidden_states import HiddenStateStore


def test_a_model_of_one_block_has_nothing_to_drop(tmp_path: Path) -> None:
    store = HiddenStateStore("device", "cpu", tmp_path / "streams")
    store.drop(1)
    assert not (tmp_path / "streams").exists()
