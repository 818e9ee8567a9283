"""Masks as data, masks inferred from zeros, and the hold on gradients and weights."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from sparsify.errors import InputError
from sparsify.formats.verify import check_weight
from sparsify.masks.select import keep_mask_from_scores
from sparsify.masks.storage import load_masks, mask_digest, mask_from_bits, mask_to_bits, save_masks
from sparsify.models.masked import (
    apply_masks_,
    clear_pruned_,
    has_alive,
    infer_masks,
    mask_gradients,
    num_alive,
)
from sparsify.pattern import Pattern

NAME = "0"


def random_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_bit_order_is_pinned():
    """A file written today must mean the same tomorrow."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[1, 4] = True  # elements 0, 3 and 9
    assert mask_to_bits(mask).tolist() == [0b0000_1001, 0b0000_0010]


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(0, 9), columns=st.integers(1, 37), seed=st.integers(0, 2**31))
def test_pack_round_trip(rows, columns, seed):
    mask = random_mask(rows, columns, seed=seed)
    packed = mask_to_bits(mask)
    assert packed.numel() == -(-rows * columns // 8)
    assert torch.equal(mask_from_bits(packed, mask.shape), mask)


def test_unpack_refuses_a_wrong_size():
    with pytest.raises(InputError, match="needs 3 bytes"):
        mask_from_bits(mask_to_bits(random_mask(4, 4)), (4, 5))


def test_digest_depends_on_bits_and_shape():
    mask = random_mask(4, 8)
    other = mask.clone()
    other[3, 7] ^= True
    assert mask_digest(mask) == mask_digest(mask.clone())
    assert len({mask_digest(m) for m in (mask, other, mask.view(8, 4), mask.T)}) == 4
    expected = hashlib.sha256(b"(4, 8)" + bytes(mask_to_bits(mask).tolist())).hexdigest()
    assert mask_digest(mask) == expected


def test_save_and_load(tmp_path):
    masks = {"b": random_mask(3, 5), "a": random_mask(2, 8, seed=1)}
    save_masks(tmp_path / "masks.safetensors", masks)
    loaded = load_masks(tmp_path / "masks.safetensors")
    assert list(loaded) == ["a", "b"]
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    save_masks(tmp_path / "again.safetensors", dict(reversed(masks.items())))
    first, second = (
        (tmp_path / f).read_bytes() for f in ("masks.safetensors", "again.safetensors")
    )
    assert first == second


def test_bad_mask_files_are_refused(tmp_path):
    path = tmp_path / "masks.safetensors"
    with pytest.raises(InputError, match="no such file"):
        load_masks(path)
    save_masks(path, {"a": random_mask(64, 64)})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated or corrupt"):
        load_masks(path)
    save_file({"a": torch.zeros(4)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="not a mask file"):
        load_masks(path)


# --- inferred masks --------------------------------------------------------------------------


def prune_(model: nn.Module, pattern: Pattern) -> dict[str, torch.Tensor]:
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            masks[name] = keep_mask_from_scores(module.weight.detach().abs(), pattern)
    apply_masks_(model, masks)
    return masks


@pytest.mark.parametrize("text", ["2:4", "4:8", "unstructured:0.5"])
def test_masks_are_inferred_from_zeros(tiny_model, text):
    pattern = Pattern.parse(text)
    masks = prune_(tiny_model, pattern)
    inferred = infer_masks(tiny_model, pattern)
    assert set(inferred) == set(masks)
    assert len(masks) == 14
    assert all(torch.equal(inferred[name], masks[name]) for name in masks)


def test_a_kept_zero_stays_trainable(tiny_model):
    pattern = Pattern.parse("2:4")
    masks = prune_(tiny_model, pattern)
    name = "model.layers.0.mlp.up_proj"
    weight = tiny_model.get_submodule(name).weight.data
    row, column = (int(i) for i in masks[name].nonzero()[0])
    weight[row, column] = 0.0
    keep_mask = infer_masks(tiny_model, pattern)[name]
    assert (keep_mask.view(-1, 4).sum(dim=1) == 2).all()
    assert not (weight[~keep_mask] != 0).any()


def test_a_layer_off_the_pattern_is_named(tiny_model):
    pattern = Pattern.parse("2:4")
    prune_(tiny_model, pattern)
    name = "model.layers.1.self_attn.o_proj"
    tiny_model.get_submodule(name).weight.data[7, 8:12] = 1.0
    with pytest.raises(InputError, match=rf"{name}.*2:4.*row 7, group 2, from column 8"):
        infer_masks(tiny_model, pattern)
    skipped = infer_masks(tiny_model, pattern, skip=["*.o_proj"])
    assert len(skipped) == 12
    assert not any("o_proj" in layer for layer in skipped)


# --- hold on gradients and weights -----------------------------------------------------------


def test_gradient_is_zero_at_pruned_weights_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    mask = random_mask(6, 8)
    inputs = torch.randn(5, 8)
    model(inputs).square().sum().backward()
    dense = model[0].weight.grad.clone()
    model.zero_grad()
    handles = mask_gradients(model, {NAME: mask})
    model(inputs).square().sum().backward()
    assert torch.equal(model[0].weight.grad, torch.where(mask, dense, 0))
    assert model[0].bias.grad.abs().sum() > 0
    for handle in handles:
        handle.remove()
    model.zero_grad()
    model(inputs).square().sum().backward()
    assert torch.equal(model[0].weight.grad, dense)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_gradient_at_a_pruned_weight_becomes_zero(bad):
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, 1] = False
    mask_gradients(model, {NAME: mask})
    inputs = torch.ones(2, 4)
    inputs[0, 1] = bad  # reaches the gradient of column 1 alone
    (inputs @ model[0].weight.T).backward(torch.ones(2, 3))
    assert torch.equal(model[0].weight.grad, 2.0 * mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_masked_gradient_has_the_bits_of_a_filled_one(dtype):
    """37 x 5 elements: the last byte of the packed mask is not full."""
    mask = random_mask(37, 5)
    weight = nn.Parameter(torch.zeros(37, 5, dtype=dtype))
    model = nn.Linear(5, 37, bias=False)
    model.weight = weight
    mask_gradients(nn.Sequential(model), {NAME: mask})
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(37, 5, generator=generator).to(dtype)
    grad[mask.nonzero()[0][0], mask.nonzero()[0][1]] = -0.0
    grad[:3][~mask[:3]] = float("nan")
    for one in (grad, grad.T.contiguous().T):  # in both memory layouts
        weight.grad = None
        before = one.clone()
        weight.backward(one)
        expected = torch.where(mask, one, torch.zeros((), dtype=dtype))
        assert torch.equal(weight.grad, expected)
        assert torch.equal(weight.grad.signbit(), expected.signbit())
        assert torch.equal(one.isnan(), before.isnan()), "the gradient itself is not changed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_alive_is_all_but_zero_at_a_pruned_place(dtype):
    """The smallest number there is, NaN and infinity are seen; -0 is not, nor what is kept."""
    values, pruned = torch.zeros(67, dtype=dtype), random_mask(67)
    values[~pruned] = 1.0
    values[pruned] = -0.0
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    empty = (values[:0], pruned[:0])
    assert not has_alive([(values, pruned), empty])
    assert not has_alive([])
    for bad in (smallest, -smallest, float("nan"), float("inf"), -1.0):
        for place in pruned.nonzero()[[0, -1], 0]:
            wrong = values.clone()
            wrong[place] = bad
            assert wrong[place].item() != 0
            assert has_alive([(values, pruned), (wrong, pruned)])


def test_zeros_survive_adamw_with_decay_clipping_and_bfloat16():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).bfloat16()
    masks = {NAME: random_mask(16, 16)}
    apply_masks_(model, masks)
    assert num_alive(model, masks) == 0
    mask_gradients(model, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = model[0].weight.detach().clone()
    for _ in range(5):
        model(torch.randn(4, 16, dtype=torch.bfloat16)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert num_alive(model, masks) == 0
    assert (model[0].weight != before)[masks[NAME]].float().mean() > 0.9


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
def test_tied_weights(names):
    model = Tied()
    mask = random_mask(4, 4)
    masks = dict.fromkeys(names, mask)
    apply_masks_(model, masks)
    assert len(mask_gradients(model, masks)) == 1
    model.second(model.first(torch.randn(3, 4))).sum().backward()
    assert not model.first.weight.grad[~mask].any()
    assert model.first.weight.grad[mask].any()
    assert num_alive(model, masks) == 0


def test_tied_weights_with_unequal_masks_are_refused():
    with pytest.raises(InputError, match="first and second: the layers share one weight"):
        mask_gradients(Tied(), {"first": random_mask(4, 4), "second": ~random_mask(4, 4)})


def test_masks_of_another_model_are_refused():
    model = nn.Sequential(nn.Linear(8, 6))
    for action in (mask_gradients, apply_masks_, num_alive):
        with pytest.raises(InputError, match="layer 3: the model has no such layer"):
            action(model, {"3": random_mask(6, 8)})
        with pytest.raises(InputError, match=r"layer 0: shape \(8, 6\).*\(6, 8\)"):
            action(model, {NAME: random_mask(8, 6)})


def test_a_pruned_weight_that_moved_is_counted():
    model = nn.Sequential(nn.Linear(8, 6))
    masks = {NAME: random_mask(6, 8)}
    apply_masks_(model, masks)
    row, column = (int(i) for i in (~masks[NAME]).nonzero()[-1])
    model[0].weight.data[row, column] = 1e-30
    assert num_alive(model, masks) == 1


def half_of_each_layer_(model) -> None:
    """Zeros as SparseGPT's own code leaves them without a pattern: the rows have unlike numbers."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                threshold = weight.abs().flatten().kthvalue(weight.numel() // 2).values
                weight[weight.abs() <= threshold] = 0


def test_unstructured_zeros_are_taken_as_they_are(tiny_model):
    half_of_each_layer_(tiny_model)
    for text in ("unstructured:0.5", "unstructured:0.3"):
        masks = infer_masks(tiny_model, Pattern.parse(text))
        assert len(masks) == 14
        for name, mask in masks.items():
            weight = tiny_model.get_submodule(name).weight
            assert torch.equal(mask, weight != 0)
            assert mask.sum(1).unique().numel() > 1
            check_weight(name, weight, mask, Pattern.parse(text))
    with pytest.raises(InputError, match=r"q_proj: not pruned to .*:0\.6 \(50\.00% of it"):
        infer_masks(tiny_model, Pattern.parse("unstructured:0.6"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("start", "stop"), [(0, 50), (3, 41), (8, 9), (13, 50)])
def test_a_piece_of_a_gradient_is_cleared_as_the_whole_is(dtype, start, stop):
    keep = random_mask(5, 10).flatten()
    bits = mask_to_bits(keep)[start // 8 : -(-stop // 8)]
    values = torch.randn(50).to(dtype)
    values[~keep] = float("nan")
    piece = values[start:stop].clone()
    clear_pruned_(piece, bits, start % 8)
    assert torch.equal(piece, values[start:stop].masked_fill(~keep[start:stop], 0))
    assert not piece[~keep[start:stop]].signbit().any()
