"""Where hidden states wait, and what is left: by the memory there is, the same on all workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from conf.schema import Config
from jobs.workers import placement as place
from sparsify.calibration.hidden_states import Memory

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


def sizes(model: Path, device: str, num_tokens: int, *more: bool) -> place.Sizes:
    context: Any = SimpleNamespace(world_size=1, device=device)
    return place.walk_sizes(context, Config(), model, num_tokens, *(more or (False,)))


def where(model: Path, device: str, num_tokens: int) -> str:
    return sizes(model, device, num_tokens).place


def test_caches_of_files_are_memory_that_can_be_had(
    tiny_model_dir: Path, no_limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that just read a checkpoint has hardly a free page, and all of it available."""
    memory(monkeypatch, 4 * GB)
    assert where(tiny_model_dir, "cpu", 10**6) == "device"
    memory(monkeypatch, 0.4 * GB)
    assert where(tiny_model_dir, "cpu", 10**6) == "disk"


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
    assert where(tiny_model_dir, "cuda", 10**6) == "device"
    gpu(monkeypatch, 0.1 * GB, 20 * GB, 20 * GB)
    assert where(tiny_model_dir, "cuda", 10**6) == "host"


def test_states_wait_on_the_device_if_they_alone_fit(
    tiny_model_dir: Path, no_limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards and masks have what is left of the room, which decides nothing about the states."""
    states = 10**6 * 64 * 4
    memory(monkeypatch, 64 * GB)
    gpu(monkeypatch, states / 0.4 + 100, 0, 0)
    found = sizes(tiny_model_dir, "cuda", 10**6)
    assert found.place == "device" and found.spare("device") == pytest.approx(40, abs=1)
    assert found.spare("host") == pytest.approx(states, rel=1e-3)
    for has_teacher, models in ((False, 1), (True, 6)):
        ahead = sizes(tiny_model_dir, "cuda", 10**6, has_teacher, True)
        assert (ahead.place, ahead.ahead) == ("host", models * states)
        assert ahead.spare("device") == 0
    on_cpu = sizes(tiny_model_dir, "cpu", 10**6)
    assert on_cpu.spare("host") == on_cpu.spare("device") == 32 * GB - states
    assert on_cpu.spare("disk") == 32 * GB


@pytest.mark.parametrize(
    ("room", "asked", "expected", "spare"),
    [
        ([30, 25], "auto", "device", 15), ([30, 5], "auto", "host", 5),
        ([30, 5], "disk", "disk", 5),
        ([5, 5], "device", "device", 0), ([11], "auto", "device", 1),
    ],
)  # fmt: skip
def test_workers_go_by_the_one_with_the_least_room(
    room: list[int], asked: str, expected: str, spare: int
) -> None:
    """States of 10 bytes; each worker is asked what all of them are."""
    all_of_them = [place.Sizes(10, 0, on_device, 100, False) for on_device in room]
    for own in all_of_them:
        answers = iter([
            [each.place for each in all_of_them], [each.spare(expected) for each in all_of_them]
        ])  # fmt: skip
        comm: Any = SimpleNamespace(gather_objects=lambda _, answers=answers: next(answers))
        found = place.placed(comm, own, asked, Memory(3, "bfloat16", "cuda"))
        assert found == Memory(3, "bfloat16", "cuda", expected, spare)  # type: ignore[arg-type]
