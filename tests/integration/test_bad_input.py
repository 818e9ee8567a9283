"""What a user can get wrong, through the real command: one line, the right code, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def broken(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, folder)
    return folder


def expect(done: subprocess.CompletedProcess, code: int, *parts: str) -> None:
    """One clear line of error, of this exit code, with these words."""
    assert done.returncode == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for part in parts:
        assert part in last
    assert "Traceback" not in done.stderr


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")


def edit_weights(folder: Path, name: str, value: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[3] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def prune(run_job, small, tmp_path):
    """The command with one thing wrong."""

    def run(*overrides: str) -> subprocess.CompletedProcess:
        return run_job("prune", *small, f"run.dir={tmp_path / 'run'}", *overrides)

    return run


def test_a_missing_model_folder(prune) -> None:
    expect(prune("model.path=/no/such/model"), 2, "/no/such/model")


def test_a_corrupt_config(prune, broken: Path) -> None:
    (broken / "config.json").write_text("{", encoding="utf-8")
    expect(prune(f"model.path={broken}"), 2, "config.json")


def test_a_truncated_shard(prune, broken: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    expect(prune(f"model.path={broken}"), 2, "model.safetensors")


def test_a_tokenizer_of_another_model(prune, broken: Path) -> None:
    edit_config(broken, vocab_size=100)
    expect(prune(f"model.path={broken}"), 2, "100")


def test_non_finite_weights(prune, broken: Path) -> None:
    edit_weights(broken, "model.layers.1.mlp.up_proj.weight", float("nan"))
    expect(prune(f"model.path={broken}"), 2, "model.layers.1.mlp.up_proj.weight")


def test_non_finite_activations(prune, broken: Path) -> None:
    edit_weights(broken, "model.layers.1.mlp.up_proj.weight", 3e38)
    edit_weights(broken, "model.layers.1.mlp.gate_proj.weight", 3e38)
    expect(prune(f"model.path={broken}"), 1, "layers.1")


def test_empty_and_short_calibration_text(prune, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    expect(prune(f"data.calibration={empty}"), 2, "empty.txt")
    short = tmp_path / "short.txt"
    short.write_text("only a few words", encoding="utf-8")
    expect(prune(f"data.calibration={short}", "run.redo=[prune]"), 2, "short.txt", "tokens")


def test_a_missing_text(prune) -> None:
    expect(prune("data.calibration=no-such-text.txt"), 2, "no-such-text.txt")


def test_columns_the_pattern_does_not_divide(prune) -> None:
    expect(prune("prune.pattern=2:5", "prune.block_size=5"), 2, "layers.0", "64")


def test_a_sequence_longer_than_the_model(prune) -> None:
    options = ["data.sequence_length=129", "distill.num_tokens=20000", "evaluate.num_tokens=2000"]
    expect(prune(*options), 2, "129", "128")


def test_a_run_folder_that_is_a_file(run_job, small, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("", encoding="utf-8")
    expect(run_job("prune", *small, f"run.dir={path}"), 2, "is a file")
    expect(run_job("prune", *small, f"run.dir={path}/below"), 2, "cannot be written")


def test_a_damaged_stage_of_ones_own_run_is_redone(prune, tmp_path: Path) -> None:
    """In a folder of a name that not every part of Ray takes."""
    folder = tmp_path / "ein Läufer"
    words = ["stages=[prune]", "prune.baselines=[]", "prune.method=wanda", f"run.dir={folder}/"]
    assert prune(*words).returncode == 0
    shard = min((folder / "prune" / "wanda").glob("model-*.safetensors"))
    os.truncate(shard, 100)
    for again in (words, [*words, "--dry-run"]):
        expect(prune(*again), 2, str(shard), "add run.redo=[prune]")
    assert prune(*words, "run.redo=[prune]").returncode == 0
    record = folder / "prune" / "record.json"
    os.truncate(record, 100)
    expect(prune(*words), 2, str(record), "not JSON", "add run.redo=[prune]")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_keeps_what_was_finished(run_job, small, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a small disk")
    try:
        done = run_job("prune", *small, f"run.dir={disk / 'run'}")
        expect(done, 1, "disk is full")
        assert not (disk / "run" / "distill").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("override", "part"),
    [("cluster=h100x32", "+cluster"), ("+cluster=nowhere", "h100x32"), ("prune.damp=1", "damping"),
     ("prune.pattern", "="), ("+cluster=h100x32", "32")],
)  # fmt: skip
def test_a_malformed_override_and_a_cluster_that_is_not_there(prune, override, part) -> None:
    expect(prune(override), 2, part)


def test_weights_of_the_right_shape_are_not_touched_by_a_failed_run(prune, broken: Path) -> None:
    before = (broken / "model.safetensors").read_bytes()
    expect(prune(f"model.path={broken}", "prune.skip=[no.such.layer]"), 2, "no.such.layer")
    assert (broken / "model.safetensors").read_bytes() == before
    assert torch.isfinite(load_file(broken / "model.safetensors")["lm_head.weight"]).all()
