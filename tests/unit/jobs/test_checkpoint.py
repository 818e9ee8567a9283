"""Checkpoints are whole or absent: interrupted in every phase, damaged in every file, re-cut."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jobs.training import checkpoint as _checkpoint
from jobs.training.checkpoint import MASKS_FILE, Checkpoints, Retention, finished_steps, name_of
from sparsify.errors import CorruptCheckpointError, TwofourError
from sparsify.masks.storage import load_masks
from sparsify.training.fragments import (
    COMMITTED,
    MANIFEST,
    STATE,
    Checkpoint,
    FileFacts,
    Fragment,
    commit,
    write_fragments,
)

MASKS = {"layer": torch.tensor([[True, False, True, False]])}
PHASES = ["copied", "written", "gathered", "committed", "renamed"]


def group_of_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A process group of one."""
    group_of_one()
    yield
    dist.destroy_process_group()


def values(step: int) -> torch.Tensor:
    return torch.arange(10.0) + 100 * step


def save(folder: Path, *steps: int, **options: object) -> Checkpoints:
    checkpoints = Checkpoints(folder, Retention(**options))
    for step in steps:
        fragment = Fragment("weights", "a.weight", 0, values(step))
        checkpoints.save(step, [fragment], MASKS, {"step": step})
        checkpoints.wait()
    return checkpoints


def read(checkpoint: Checkpoint) -> torch.Tensor:
    wanted = Fragment("weights", "a.weight", 0, torch.zeros(10))
    checkpoint.fill([wanted])
    return wanted.values


def test_a_checkpoint_holds_what_was_there_when_it_was_taken(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Retention())
    live, state = values(1), {"curve": [1]}
    checkpoints.save(7, [Fragment("weights", "a.weight", 0, live)], MASKS, state)
    live.zero_()
    state["curve"].append(2)
    checkpoints.wait()
    step, checkpoint = checkpoints.latest(pytest.fail)
    assert step == 7
    assert torch.equal(read(checkpoint), values(1))
    assert checkpoint.state == {"curve": [1]}
    assert torch.equal(load_masks(checkpoint.folder / MASKS_FILE)["layer"], MASKS["layer"])


def test_retention_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    save(tmp_path, *range(1, 10), num_last=2, milestone_every_steps=4)
    assert finished_steps(tmp_path) == [4, 8, 9]


def test_nothing_is_there_before_the_first(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, Retention()).latest(pytest.fail) is None


def save_until_killed(folder: Path, at: str) -> None:
    """Save two steps in a process of its own, which dies on the way in the second."""
    group_of_one()
    armed: list[int] = []

    def die(phase: str) -> None:
        if armed and phase == at:
            os._exit(9)

    checkpoints = Checkpoints(folder, Retention(), on_phase=die)
    for step in (1, 2):
        armed += [1] * (step == 2)
        checkpoints.save(step, [Fragment("weights", "a.weight", 0, values(step))], MASKS, {})
        checkpoints.wait()


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_any_phase_the_last_whole_one_is_found(tmp_path: Path, phase: str) -> None:
    # Forked from a server that has imported torch once, and has no threads as this process has.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pytest", "jobs.training.checkpoint"])
    process = processes.Process(target=save_until_killed, args=(tmp_path, phase))
    process.start()
    process.join(180)
    assert process.exitcode == 9, "it was to die"
    checkpoints = Checkpoints(tmp_path, Retention())
    assert not list(tmp_path.glob(".step-*")), "what was half written is gone"
    step, checkpoint = checkpoints.latest(pytest.fail)
    assert step == (2 if phase == "renamed" else 1)
    assert torch.equal(read(checkpoint), values(step))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = ["rank-00000.safetensors", MASKS_FILE, STATE, MANIFEST, COMMITTED]


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flip", "truncate", "lose"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_sends_back_to_the_one_before(tmp_path: Path, name: str, damage) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / name_of(2) / name)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, Retention())
    step, checkpoint = checkpoints.latest(said.append)
    assert step == 1
    assert torch.equal(read(checkpoint), values(1))
    assert len(said) == 1
    assert name_of(2) in said[0]
    assert finished_steps(tmp_path) == [1], "the damaged one is set aside"
    save(tmp_path, 2)
    assert not list(tmp_path.glob("*.corrupt")), "and goes when there is a newer whole one"


def test_when_none_is_whole_nothing_starts_over_by_itself(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(tmp_path / name_of(1) / STATE)
    checkpoints = Checkpoints(tmp_path, Retention())
    for _ in range(2):
        with pytest.raises(CorruptCheckpointError, match=r"run\.redo=\[distill\]"):
            checkpoints.latest(lambda text: None)


def test_a_failed_write_is_raised_where_training_hears_it(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = save(tmp_path, 1)
    monkeypatch.setattr(_checkpoint, "write_fragments", full)
    checkpoints.save(2, [Fragment("weights", "a.weight", 0, values(2))], MASKS, {})
    with pytest.raises(TwofourError, match="disk is full"):
        checkpoints.wait()
    assert checkpoints.latest(pytest.fail)[0] == 1


def cut(total: int, parts: int) -> list[tuple[int, int]]:
    """Ranges like ZeRO's: equal but for the last."""
    size = -(-total // parts)
    return [(i * size, min(total, (i + 1) * size)) for i in range(parts) if i * size < total]


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (3, 1), (4, 3), (2, 4), (3, 3)])
def test_any_cut_reads_what_any_other_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    sizes = {"a": 37, "b": 4, "c": 1, "d": 64}
    generator = torch.Generator().manual_seed(0)
    whole = {
        (copy, name): torch.randn(size, generator=generator)
        for name, size in sizes.items()
        for copy in ("weights", "exp_avg")
    }
    facts = {}
    for rank in range(writers):
        own = [
            Fragment(copy, name, begin, whole[copy, name][begin:end])
            for copy, name in whole
            for i, (begin, end) in enumerate(cut(sizes[name], writers))
            if i == rank
        ]
        path = tmp_path / f"rank-{rank:05d}.safetensors"
        write_fragments(path, own)
        facts[path.name] = FileFacts.of(path)
    commit(tmp_path, facts, {})
    checkpoint = Checkpoint(tmp_path)
    checkpoint.verify()
    for copy, name in whole:
        ranges = cut(sizes[name], readers)
        wanted = [Fragment(copy, name, b, torch.full((e - b,), -9.0)) for b, e in ranges]
        checkpoint.fill(wanted)
        assert torch.equal(torch.cat([one.values for one in wanted]), whole[copy, name])
    for wrong in (Fragment("weights", "a", 30, torch.zeros(8)),
                  Fragment("exp_avg_sq", "a", 0, torch.zeros(1))):  # fmt: skip
        with pytest.raises(CorruptCheckpointError, match="another model"):
            checkpoint.fill([wrong])


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / name_of(1)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": "other"}))
    (folder / COMMITTED).write_text(FileFacts.of(folder / MANIFEST).sha256)
    with pytest.raises(CorruptCheckpointError, match="format other"):
        Checkpoint(folder)
