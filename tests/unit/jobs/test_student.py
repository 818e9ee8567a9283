"""Where a recovery begins: whose weights, behind which masks, in which basis."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.options.distill import DistillConfig
from conf.schema import Config
from jobs.benchmarks.support.families import random_family
from jobs.training.engine import Partitioner
from jobs.training.student import load_student
from sparsify.errors import InputError
from sparsify.formats.sparse_folder import MASKS, write_sparsity
from sparsify.masks.select import keep_mask_from_scores
from sparsify.masks.storage import save_masks
from sparsify.models.load import load_model, load_pair
from sparsify.models.masked import apply_masks_, infer_masks, num_alive
from sparsify.models.save import save_model
from sparsify.models.structure import find_blocks
from sparsify.pattern import Pattern
from sparsify.rotation.basis import Rotation, fold_rotation
from tests.conftest import count_violations
from tests.integration.recoveries import Worker

PATTERN = Pattern.parse("2:4")
MOVING = {"moving_share": 0.5}


def some_masks(model: Any) -> dict[str, torch.Tensor]:
    """Masks that are not those of the largest weights."""
    prefix, blocks = find_blocks(model)
    return {
        name: keep_mask_from_scores(-module.weight.detach().abs(), PATTERN)
        for name, module in blocks.named_modules(prefix=prefix)
        if isinstance(module, torch.nn.Linear)
    }


@pytest.fixture
def pruned(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with `some_masks`, as the prune stage leaves it."""
    model, tokenizer = load_pair(tiny_model_dir)
    masks = some_masks(model)
    apply_masks_(model, masks)
    save_model(model, tokenizer, tmp_path / "pruned")
    save_masks(tmp_path / "pruned" / MASKS, masks)
    write_sparsity(tmp_path / "pruned", masks, "2:4", "magnitude", {})
    return tmp_path / "pruned"


def begin(folder: Path, dense: Path, rotation: Path | None = None, **settings: Any) -> Any:
    """(model, masks, what was said)."""
    config, worker = Config(distill=DistillConfig(**settings)), Worker(0, 1)
    split = Partitioner(config.distill, 1, False)
    found = load_student(folder, dense, rotation, config, worker, split)
    assert found.pattern == PATTERN
    return found.model, found.masks, worker.said


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_a_dense_model_begins_as_it_is_behind_its_largest_weights(tiny_model_dir) -> None:
    student, masks, said = begin(tiny_model_dir, tiny_model_dir, **MOVING)
    dense = load_model(tiny_model_dir)
    assert same_weights(student, dense)
    assert len(masks) == 14
    for name, mask in masks.items():
        groups = dense.get_submodule(name).weight.detach().abs().unflatten(1, (-1, 4))
        smallest_kept = groups.masked_fill(~mask.unflatten(1, (-1, 4)), torch.inf).amin(-1)
        largest_pruned = groups.masked_fill(mask.unflatten(1, (-1, 4)), 0).amax(-1)
        assert (smallest_kept >= largest_pruned).all()
        assert count_violations(mask.float(), PATTERN) == 0
    assert said == [
        "distill: starts with dense weights: 50.0% of those of 14 layers are alive under their "
        "masks, and are cut when masks stay"
    ]


@pytest.mark.parametrize("settings", [{"recompute_share": 0.5}, {"compile": True}])
def test_blocks_with_experts_are_compiled_or_recomputed(
    settings: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Not both, which is said."""
    random_family("mixtral", vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    both = begin(tmp_path, tmp_path, **MOVING, recompute_share=0.5, compile=True)[2]
    assert "distill.compile: torch does not compile blocks with experts" in " ".join(both)
    one = begin(tmp_path, tmp_path, **MOVING, **settings)[2]
    assert "distill.compile" not in " ".join(one)


def test_a_dense_model_is_refused_where_masks_stay(tiny_model_dir) -> None:
    with pytest.raises(InputError, match=r"not pruned to 2:4.*distill\.moving_share"):
        begin(tiny_model_dir, tiny_model_dir)


@pytest.mark.parametrize("settings", [{}, MOVING])
def test_a_pruned_model_begins_with_its_zeros(pruned, tiny_model_dir, settings) -> None:
    student, masks, said = begin(pruned, tiny_model_dir, **settings)
    assert num_alive(student, masks) == 0
    assert said == []


@pytest.mark.parametrize("has_masks", [True, False])
def test_dense_weights_begin_behind_the_masks_of_the_pruned_model(
    pruned, tiny_model_dir, has_masks
) -> None:
    if not has_masks:  # pruned elsewhere: they are read from its zeros
        (pruned / "sparsity.json").unlink()
        shutil.rmtree((pruned / MASKS).parent)
    student, masks, said = begin(pruned, tiny_model_dir, moving_start="dense", **MOVING)
    dense = load_model(tiny_model_dir)
    assert same_weights(student, dense)
    wanted = some_masks(dense)
    assert all(torch.equal(masks[name], mask) for name, mask in wanted.items())
    assert num_alive(student, masks) == sum(int((~mask).sum()) for mask in masks.values())
    assert "50.0% of those of 14 layers" in said[0]


def test_dense_weights_begin_in_the_basis_of_the_pruned_model(
    pruned, tiny_model_dir, tmp_path, tiny_rows
) -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = Rotation(torch.linalg.qr(torch.randn(64, 64, generator=generator).double()).Q, [])
    rotation.save(tmp_path / "rotation.safetensors")
    student, *_ = begin(
        pruned, tiny_model_dir, tmp_path / "rotation.safetensors", moving_start="dense", **MOVING
    )
    dense = load_model(tiny_model_dir).eval()
    before = dense(tiny_rows.ids_NT).logits
    fold_rotation(dense, rotation)
    assert same_weights(student, dense)
    # Rounding of float32, measured 4e-7; another basis would not change what is computed either,
    # so the weights are compared above.
    torch.testing.assert_close(dense(tiny_rows.ids_NT).logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", ["2:4", "4:8", "unstructured:0.5"])
def test_the_largest_weights_of_a_pruned_model_are_those_it_kept(tiny_model, text) -> None:
    pattern = Pattern.parse(text)
    masks = infer_masks(tiny_model, pattern, ["*.o_proj"], may_be_dense=True)
    assert len(masks) == 12
    apply_masks_(tiny_model, masks)
    found = infer_masks(tiny_model, pattern, ["*.o_proj"])
    again = infer_masks(tiny_model, pattern, ["*.o_proj"], may_be_dense=True)
    for name, mask in masks.items():
        assert torch.equal(found[name], mask)
        assert torch.equal(again[name], mask)
