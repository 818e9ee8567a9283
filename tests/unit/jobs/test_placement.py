"""Where hidden states wait: by the memory that can be had, and the same on all workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from conf.schema import Config
from jobs.workers import placement as place
from sparsify.calibration.layers import SolverNeeds

GB = 10**9


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_CGROUPS", ())


def memory(monkeypatch: pytest.MonkeyPatch, available: float) -> None:
    found = SimpleNamespace(available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def gpu(monkeypatch: pytest.MonkeyPatch, free: float, reserved: float, allocated: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free), 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(reserved))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: int(allocated))


def where(model: Path, device: str, num_tokens: int, **needs: Any) -> str:
    context: Any = SimpleNamespace(world_size=1, device=device)
    config = Config()
    config.data.sequence_length = 64
    return place.placement(context, config, model, num_tokens, SolverNeeds(**needs))


def test_caches_of_files_are_memory_that_can_be_had(
    tiny_model_dir: Path, no_limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that just read a checkpoint has hardly a free page, and all of it available."""
    memory(monkeypatch, 4 * GB)
    assert where(tiny_model_dir, "cpu", 10**6, order="block") == "device"
    memory(monkeypatch, 0.4 * GB)
    assert where(tiny_model_dir, "cpu", 10**6, order="block") == "disk"


@pytest.mark.parametrize(
    ("limit", "used", "cached", "expected"),
    [("max", 1, 0, 4 * GB), (str(3 * GB), 2 * GB, GB // 2, 1.5 * GB), (str(GB), 2 * GB, 0, 0)],
)
def test_a_container_has_no_more_than_its_limit(
    limit: str, used: int, cached: int, expected: float, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "max").write_text(f"{limit}\n")
    (tmp_path / "current").write_text(f"{used}\n")
    (tmp_path / "stat").write_text(f"anon 5\ninactive_file {cached}\n")
    files = (tmp_path / "max", tmp_path / "current", tmp_path / "stat", "inactive_file")
    monkeypatch.setattr(place, "_CGROUPS", (files, (tmp_path / "no such group", *files[1:])))
    memory(monkeypatch, 4 * GB)
    assert place.available_bytes() == expected


def test_what_torch_keeps_unused_of_a_gpu_is_free(
    tiny_model_dir: Path, no_limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the baselines, which ran before in the same process."""
    memory(monkeypatch, 64 * GB)
    gpu(monkeypatch, 1 * GB, 20 * GB, 1 * GB)
    assert where(tiny_model_dir, "cuda", 10**6, order="block") == "device"
    gpu(monkeypatch, 0.1 * GB, 20 * GB, 20 * GB)
    assert where(tiny_model_dir, "cuda", 10**6, order="block") == "host"


def test_masks_of_held_forwards_take_room(
    tiny_model_dir: Path, no_limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (2 * 64 + 64 + 128) * 4  # of a token: states thrice, the widest activation
    tokens = 10**5
    memory(monkeypatch, 2 * tokens * (shape + 63))
    assert where(tiny_model_dir, "cpu", tokens, order="layer") != "device"
    memory(monkeypatch, 2 * tokens * (shape + 65))
    assert where(tiny_model_dir, "cpu", tokens, order="layer") == "device"


@pytest.mark.parametrize(
    ("all_of_them", "expected"),
    [(["device", "host"], "host"), (["host", "disk", "device"], "disk"), (["device"], "device")],
)
def test_workers_go_by_the_one_with_the_least_room(all_of_them: list[str], expected: str) -> None:
    comm: Any = SimpleNamespace(gather_objects=lambda own: all_of_them)
    assert place.agreed(comm, all_of_them[0]) == expected  # type: ignore[arg-type]
