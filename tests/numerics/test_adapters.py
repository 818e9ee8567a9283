"""LoRA on sparse layers, against autograd through the formula and the merge in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.adapters.lora import LowRank, adapters_of, attach, cut_share, merged
from sparsify.errors import InputError
from sparsify.masks.select import require_pattern
from sparsify.pattern import Pattern
from tests.conftest import count_violations, message

ROWS, IN, OUT, RANK, ALPHA = 10, 24, 16, 3, 6.0


def sparse_layer(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias)
    weight = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    order = weight.abs().unflatten(1, (-1, 4)).argsort(-1, descending=True)
    keep = torch.zeros_like(weight, dtype=torch.bool).unflatten(1, (-1, 4))
    keep = keep.scatter(2, order[..., :2], True).flatten(1)
    linear.weight = nn.Parameter((weight * keep).to(dtype), requires_grad=False)
    if bias:
        drawn = torch.randn(OUT, generator=generator, dtype=torch.float64)
        linear.bias = nn.Parameter(drawn.to(dtype), requires_grad=False)
    return linear, keep


def adapted(way: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, LowRank, Tensor]:
    linear, keep = sparse_layer(dtype)
    generator = torch.Generator().manual_seed(1)
    adapter = LowRank(linear, RANK, ALPHA, keep, way, generator=generator)
    with torch.no_grad():
        drawn = torch.randn(OUT, RANK, generator=generator, dtype=torch.float64)
        adapter.up_OR.copy_(drawn)
    attach(linear, adapter)
    return linear, adapter, keep


@pytest.mark.parametrize("way", ["masked", "at_merge"])
def test_output_and_gradients_are_those_of_the_formula(way: str) -> None:
    linear, adapter, keep = adapted(way)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, ROWS, IN, generator=generator, dtype=torch.float64, requires_grad=True)
    up = adapter.up_OR.detach().clone().requires_grad_()
    down = adapter.down_RI.detach().clone().requires_grad_()
    other = x.detach().clone().requires_grad_()
    change = ALPHA / RANK * (up @ down)
    weight = linear.weight + (change * keep if way == "masked" else change)
    expected = other @ weight.T + linear.bias
    found = linear(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    found.backward(direction)
    expected.backward(direction)
    for one, two in ((x, other), (adapter.up_OR, up), (adapter.down_RI, down)):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-12)
    assert linear.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_is_trained_as_it_is_merged_to_the_bit(dtype: torch.dtype) -> None:
    linear, adapter, keep = adapted("masked", dtype)
    x = torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight = merged(linear.weight, adapter.down_RI, adapter.up_OR, adapter.scale, keep)
    assert weight.dtype == dtype
    assert torch.equal(linear(x), x @ weight.T + linear.bias)
    exact = linear.weight.double() + adapter.scale * keep * (
        adapter.up_OR.double() @ adapter.down_RI.double()
    )
    torch.testing.assert_close(weight.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("way", ["masked", "at_merge"])
def test_every_zero_survives_the_merge_and_the_plain_one_breaks_them(way: str) -> None:
    linear, adapter, keep = adapted(way, torch.float32)
    pattern = Pattern.parse("2:4")
    weight = merged(linear.weight, adapter.down_RI, adapter.up_OR, adapter.scale, keep)
    require_pattern([("layer", weight)], pattern)
    assert bool((weight[~keep] == 0).all())
    plain = merged(linear.weight, adapter.down_RI, adapter.up_OR, adapter.scale, None)
    assert count_violations(plain, pattern) == plain.numel() // 4


def test_what_the_merge_cuts_is_measured() -> None:
    _, adapter, keep = adapted("at_merge")
    change = adapter.up_OR @ adapter.down_RI
    expected = float((change * ~keep).norm() ** 2 / change.norm() ** 2)
    assert cut_share(adapter.down_RI, adapter.up_OR, keep) == pytest.approx(expected, rel=1e-12)
    assert cut_share(adapter.down_RI, torch.zeros(OUT, RANK), keep) == 0.0


def test_at_the_start_nothing_changes_and_only_adapters_learn() -> None:
    linear, keep = sparse_layer(torch.float32)
    before = linear.weight.clone()
    x = torch.randn(ROWS, IN)
    expected = linear(x)
    attach(linear, LowRank(linear, RANK, ALPHA, keep, "masked"))
    assert torch.equal(linear(x), expected)
    model = nn.Sequential(linear)
    assert list(adapters_of(model)) == ["0"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.adapter.down_RI", "0.adapter.up_OR"}
    assert torch.equal(linear.weight, before)


def test_a_mask_of_another_layer_is_refused() -> None:
    linear, keep = sparse_layer()
    with pytest.raises(InputError) as error:
        LowRank(linear, RANK, ALPHA, keep[:, :8], "masked")
    assert "mask of shape (16, 8) for a layer of (16, 24)" in message(error)
