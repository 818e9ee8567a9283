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


def test_states_on_the_host_are_pinned_also_after_a_resume(tmp_path: Path, monkeypatch) -> None:
    """And put into the same memory block after block: pinning takes longer than a copy."""
    pinned, empty = [], torch.empty

    def allocate(*size: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        made = empty(*size, **options)
        pinned.extend([made.data_ptr()] * pin_memory)
        return made

    monkeypatch.setattr(torch, "empty", allocate)
    before = HiddenStateStore("device", "cpu", tmp_path)
    states = torch.arange(6.0).view(1, 2, 3)
    before.put("pruned", 0, states, block=1)
    before.commit(1)
    store = HiddenStateStore("host", "meta", tmp_path)
    store.restore(1, ["pruned"], [0])
    assert torch.equal(store._held["pruned", 0], states)
    assert [store._held["pruned", 0].data_ptr()] == pinned
    store.put("pruned", 0, states + 1, block=2)
    assert torch.equal(store._held["pruned", 0], states + 1)
    assert [store._held["pruned", 0].data_ptr()] == pinned
