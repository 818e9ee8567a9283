"""Dense bfloat16 layers for few tokens on a CPU, against products in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.integrations.dense import DenseLinear, leave_dense, speed_up_dense
from sparsify.integrations.linear import PackedLinear
from sparsify.kernels.cpu import dense
from sparsify.kernels.cpu.library import library

PATHS = ("plain", "avx2", "avx512")


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    if library() is None:
        pytest.skip("no C++ compiler for the CPU kernels")


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1000, 64), (1027, 96), (33, 4096)])
@pytest.mark.parametrize("path", PATHS)
def test_products_are_rounded_once(path, num_rows, num_columns, num_tokens):
    """To bfloat16 from sums in float32, whose rounding is measured at most 3e-7 of the terms."""
    if path not in library().paths:
        pytest.skip(f"this processor has no {path}")
    inputs = numbers(num_tokens, 2, num_columns)[:, 1].bfloat16()  # strided
    weight, bias = numbers(num_rows, num_columns).bfloat16(), numbers(num_rows)
    assert dense.takes(inputs, weight)
    found = dense.dense_linear(inputs, weight, bias, path)
    exact = inputs.double() @ weight.double().T + bias
    terms = inputs.double().abs() @ weight.double().abs().T + bias.abs()
    half_a_step = exact.abs() * torch.finfo(torch.bfloat16).eps / 2
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - exact).abs() <= half_a_step + 1e-6 * terms).all())


def test_the_number_of_threads_changes_no_bit():
    inputs, weight = numbers(2, 512).bfloat16(), numbers(1027, 512).bfloat16()
    before = torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append(dense.dense_linear(inputs, weight, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.fixture
def calls(monkeypatch) -> list[Tensor]:
    """The inputs of every product that the kernel computes."""
    found: list[Tensor] = []

    def counted(x: Tensor, *rest: Tensor | None) -> Tensor:
        found.append(x)
        return dense.dense_linear(x, *rest)

    monkeypatch.setattr("sparsify.integrations.dense.dense_linear", counted)
    return found


def head() -> nn.Linear:
    linear, other = nn.Linear(128, 512, dtype=torch.bfloat16), nn.Linear(128, 512)
    speed_up_dense(nn.ModuleList([linear, other]))
    assert (type(linear), type(other)) == (DenseLinear, nn.Linear)
    return linear


@torch.no_grad()
def test_few_tokens_take_the_kernel(calls):
    linear, x = head(), numbers(1, 4, 128).bfloat16()
    found = linear(x)
    assert len(calls) == 1
    leave_dense(linear)
    assert type(linear) is nn.Linear
    step = torch.finfo(torch.bfloat16).eps * found.abs().max()
    torch.testing.assert_close(found, linear(x), rtol=0, atol=float(step))
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("linear", "x"),
    [
        (head(), numbers(1, 5, 128).bfloat16()),  # more tokens
        (head().float(), numbers(1, 4, 128)),  # another type
        (head(), numbers(1, 0, 128).bfloat16()),  # none
    ],
)
def test_all_else_is_torchs_own(calls, linear, x):
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    assert not calls


def test_a_gradient_or_the_switch_brings_torch_back(calls, monkeypatch):
    linear, x = head(), numbers(1, 4, 128).bfloat16()
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    monkeypatch.setattr(PackedLinear, "uses_kernels", False)
    with torch.no_grad():
        linear(x)
    assert not calls


def test_a_bias_that_is_trained_brings_torch_back(calls):
    linear, x = head(), numbers(1, 4, 128).bfloat16()
    linear.weight.requires_grad_(False)
    linear(x).sum().backward()
    assert linear.bias.grad is not None and not calls


@torch.no_grad()
def test_a_hook_from_before_leaves_with_the_layer(calls):
    linear, x = head(), numbers(1, 4, 128).bfloat16()
    kept = linear.forward
    leave_dense(linear)
    assert torch.equal(kept(x), nn.functional.linear(x, linear.weight, linear.bias))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scratch_memory_is_float32_whatever_the_default(dtype):
    inputs, weight = numbers(4, 65536).bfloat16(), numbers(64, 65536).bfloat16()
    expected = dense.dense_linear(inputs, weight, None)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(dense.dense_linear(inputs, weight, None), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_a_compiled_layer_computes_the_same(calls):
    linear, x = head(), numbers(1, 1, 128).bfloat16()
    expected = linear(x)
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert len(calls) > 1
