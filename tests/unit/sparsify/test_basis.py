"""The basis of hidden states: which teacher fits which student, and what folders carry along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sparsify.errors import InputError
from sparsify.formats.basis import carry_rotation, rotation_facts, teacher_rotation
from sparsify.formats.sparse_folder import ROTATION, model_fingerprint, write_sparsity
from sparsify.rotation.basis import Rotation


def sparse_model(folder: Path, made_from: Path, rotation: Rotation | None = None) -> Path:
    """A model folder as the prune stage leaves it, as far as its description goes."""
    shutil.copytree(made_from, folder)
    (folder / "sparsity.json").unlink(missing_ok=True)
    facts = {}
    if rotation is not None:
        rotation.save(folder / ROTATION)
        facts = rotation_facts(folder / ROTATION, model_fingerprint(made_from))
    elif (made_from / "sparsity.json").is_file():
        facts = carry_rotation(made_from, folder)
    write_sparsity(folder, {}, "2:4", "twofour", facts)
    return folder


def other_model(folder: Path, like: Path) -> Path:
    """A dense model of the same shape with another fingerprint."""
    shutil.copytree(like, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    return folder


def some_rotation(seed: int) -> Rotation:
    generator = torch.Generator().manual_seed(seed)
    return Rotation(torch.linalg.qr(torch.randn(64, 64, generator=generator).double()).Q, [])


@pytest.fixture
def rotated(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return sparse_model(tmp_path / "rotated", tiny_model_dir, some_rotation(0))


def test_the_model_that_was_pruned_is_turned_wherever_it_lies(
    rotated: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert teacher_rotation(rotated, tiny_model_dir, 1.0) == rotated / ROTATION
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model_dir, moved)
    assert teacher_rotation(rotated, moved, 1.0) == rotated / ROTATION


def test_models_in_one_basis_are_left_alone(
    rotated: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    plain = sparse_model(tmp_path / "plain", tiny_model_dir)
    assert teacher_rotation(plain, tiny_model_dir, 1.0) is None
    # Pruned once more without a new rotation, it is in the first one's basis.
    again = sparse_model(tmp_path / "again", rotated)
    assert teacher_rotation(again, rotated, 1.0) is None
    assert teacher_rotation(again, tiny_model_dir, 1.0) == again / ROTATION
    turned_twice = sparse_model(tmp_path / "twice", rotated, some_rotation(1))
    assert teacher_rotation(turned_twice, rotated, 1.0) == turned_twice / ROTATION
    assert teacher_rotation(again, tiny_model_dir, 0.0, "dense") == again / ROTATION
    assert teacher_rotation(plain, tiny_model_dir, 0.0, "dense") is None


def test_a_teacher_in_another_basis_is_refused_unless_nothing_compares_hidden_states(
    rotated: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = other_model(tmp_path / "other", tiny_model_dir)
    plain = sparse_model(tmp_path / "plain", tiny_model_dir)
    twice = sparse_model(tmp_path / "twice", rotated, some_rotation(1))
    for student, teacher in [(rotated, other), (plain, rotated), (twice, tiny_model_dir)]:
        with pytest.raises(InputError) as error:
            teacher_rotation(student, teacher, 0.5)
        message = str(error.value)
        assert message.startswith(f"model.teacher={teacher}: ")
        assert "distill.square_head_weight=0.5" in message
        assert message.endswith("or set distill.square_head_weight=0")
        assert "\n" not in message
        assert teacher_rotation(student, teacher, 0.0) is None
        with pytest.raises(InputError, match=r"or set distill\.moving_start=given$"):
            teacher_rotation(student, teacher, 0.0, "dense")
        both = r"or set distill\.square_head_weight=0 and distill\.moving_start=given$"
        with pytest.raises(InputError, match=both):
            teacher_rotation(student, teacher, 1.0, "dense")


def test_a_fine_tuned_copy_of_the_model_that_was_rotated_lies_in_its_basis(
    rotated: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    tuned = other_model(tmp_path / "tuned", tiny_model_dir)
    assert teacher_rotation(rotated, tuned, 1.0, is_tuned=True) == rotated / ROTATION
    turned = sparse_model(tmp_path / "turned", tuned, some_rotation(2))
    with pytest.raises(InputError, match="lie in another basis"):
        teacher_rotation(rotated, turned, 1.0, is_tuned=True)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_rotation_is_named(rotated: Path, tiny_model_dir: Path, damage: str) -> None:
    path = rotated / ROTATION
    if damage == "missing":
        path.unlink()
    else:
        some_rotation(2).save(path)
    for use in (
        lambda: teacher_rotation(rotated, tiny_model_dir, 1.0),
        lambda: carry_rotation(rotated, rotated.parent / "next"),
    ):
        with pytest.raises(InputError, match=r"rotation\.safetensors.*copy it from"):
            use()


def test_the_fingerprint_follows_the_rotation(tiny_model_dir: Path, tmp_path: Path) -> None:
    prints = {
        model_fingerprint(sparse_model(tmp_path / str(seed), tiny_model_dir, some_rotation(seed)))
        for seed in (0, 1)
    }
    assert len(prints) == 2
