"""Moving masks: the gradient written down, masks taken when due, and frozen for good."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify.errors import InputError
from sparsify.masks.select import keep_mask_from_scores
from sparsify.pattern import Pattern
from sparsify.training.moving_masks import MovingMasks
from tests.conftest import count_violations

PATTERN = Pattern.parse("2:4")


def setup(decay: float = 0.0, bias: bool = True) -> tuple[nn.Sequential, MovingMasks, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12, bias=bias), nn.Tanh(), nn.Linear(12, 8)).double()
    masks = {
        name: keep_mask_from_scores(model.get_submodule(name).weight.detach().abs(), PATTERN)
        for name in ("0", "2")
    }
    moving = MovingMasks(model, masks, PATTERN, decay)
    return model, moving, torch.randn(5, 3, 16, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_masked_layers_plus_the_decay(bias: bool) -> None:
    model, moving, x = setup(decay=0.3, bias=bias)
    model(x).square().sum().backward()
    found = [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]

    y, named, masks = x.detach().requires_grad_(), dict(model.named_parameters()), moving.masks()
    params = {name: p.detach().clone().requires_grad_() for name, p in named.items()}
    masked = {n: (params[f"{n}.weight"].detach() * m).requires_grad_() for n, m in masks.items()}
    hidden = nn.functional.linear(y, masked["0"], params.get("0.bias")).tanh()
    nn.functional.linear(hidden, masked["2"], params["2.bias"]).square().sum().backward()
    expected = [y.grad]
    for name in named:
        if name.endswith("bias"):
            expected.append(params[name].grad)
        else:
            keep = masks[name.removesuffix(".weight")]
            expected.append(masked[name[0]].grad + 0.3 * named[name].detach() * ~keep)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_mask_changes_when_it_is_due_and_not_before() -> None:
    model, moving, x = setup()
    before = moving.mask("0")
    with torch.no_grad():
        model[0].weight[~before] += 10
    model(x)
    assert torch.equal(moving.mask("0"), before)
    assert moving.share_moved() == 0
    moving.refresh()
    model(x)
    assert torch.equal(moving.mask("0"), ~before), "what was pruned is the largest now"
    assert count_violations(model[0].weight * moving.mask("0"), PATTERN) == 0
    assert moving.share_moved() == pytest.approx(96 / (96 + 48))


def test_frozen_masks_stop_gradients_and_stay() -> None:
    model, moving, x = setup(decay=0.5)
    moving.freeze()
    keep = moving.mask("0")
    with torch.no_grad():
        model[0].weight.masked_fill_(~keep, 0)
        model[2].weight.masked_fill_(~moving.mask("2"), 0)
    assert torch.equal(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
    model(x).square().sum().backward()
    assert not model[0].weight.grad[~keep].any()
    assert model[0].weight.grad[keep].all()
    moving.refresh()
    model(x)
    assert torch.equal(moving.mask("0"), keep)


def test_thawed_masks_move_again() -> None:
    model, moving, x = setup(decay=0.5)
    model(x).square().sum().backward()
    before = model[0].weight.grad.clone()
    moving.freeze()
    moving.freeze()
    moving.thaw()
    moving.thaw()
    model.zero_grad()
    model(x).square().sum().backward()
    assert torch.equal(model[0].weight.grad, before)


def test_the_masks_of_a_checkpoint_are_taken_over() -> None:
    _, moving, _ = setup()
    other = {name: ~mask for name, mask in moving.masks().items()}
    moving.load(other)
    assert all(torch.equal(moving.mask(name), mask) for name, mask in other.items())


def test_a_weight_of_two_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    mask = keep_mask_from_scores(model[0].weight.detach().abs(), PATTERN)
    with pytest.raises(InputError, match="share one weight"):
        MovingMasks(model, {"0": mask, "1": mask}, PATTERN, 0.0)


@pytest.mark.parametrize("num_blocks", [2, 5])
def test_code_of_one_block_serves_all_also_after_a_refresh(num_blocks: int) -> None:
    """Graphs that torch.compile makes do not grow with the blocks, nor when masks move."""
    torch.manual_seed(0)
    blocks = nn.Sequential(
        *(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(num_blocks))
    )
    masks = {
        f"{i}.0": keep_mask_from_scores(blocks[i][0].weight.detach().abs(), PATTERN)
        for i in range(num_blocks)
    }
    moving = MovingMasks(blocks, masks, PATTERN, 0.1)
    x = torch.randn(4, 16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    blocks(x).square().sum().backward()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before == 2  # the first block's input needs no gradient
    with torch.no_grad():
        for block in blocks:
            block[0].weight.copy_(block[0].weight.flip(1))
    moving.refresh()
    assert moving.share_moved() > 0
    blocks.zero_grad()
    blocks(x).square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    found = [p.grad.clone() for p in blocks.parameters()]
    torch._dynamo.reset()
    for block in blocks:
        block._compiled_call_impl = None
    blocks.zero_grad()
    blocks(x).square().sum().backward()
    for one, other in zip(found, blocks.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)
