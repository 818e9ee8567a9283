"""Quantisation schemes against their published levels, brute force, and the packed format."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.errors import InputError
from sparsify.masks.select import keep_mask_from_scores
from sparsify.packed.layer import pack_layer, unpack_layer
from sparsify.packed.layout import Scheme
from sparsify.pattern import Pattern
from sparsify.quantization import QuantParams, dequantize, quantize_weight
from sparsify.quantization.schemes import available_schemes, get_scheme

PATTERN = Pattern.parse("2:4")

CASES = [("int4", True), ("int4", False), ("int8", True), ("int8", False), ("w8a8", True),
         ("fp8", True), ("nf4", True)]  # fmt: skip

# QLoRA (arXiv:2305.14314), appendix E, to the digits that tell neighbours apart.
NF4 = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
       0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684,
       1.0]  # fmt: skip


def levels_of(scheme: str, zero: int | None) -> list[float]:
    """All levels, from the description of the type."""
    if scheme == "nf4":
        return NF4
    if scheme == "fp8":  # 1 sign, 4 exponent bits (bias 7), 3 mantissa bits; S.1111.111 is NaN
        found = [
            m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
            for e, m in product(range(16), range(8)) if (e, m) != (15, 7)
        ]  # fmt: skip
        return sorted({-f for f in found} | set(found))
    bits = 4 if scheme == "int4" else 8
    if zero is None:
        return [float(c) for c in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
    return [float(c - zero) for c in range(2**bits)]


def problem(seed: int, num_rows: int = 8, num_columns: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """A weight that is not centred, its mask, and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator) + 0.4
    mix = torch.randn(num_columns, num_columns, generator=generator) / num_columns**0.5
    inputs = torch.randn(6 * num_columns, num_columns, generator=generator)
    inputs = inputs @ (mix + torch.eye(num_columns))
    keep = keep_mask_from_scores(weight.abs(), PATTERN)
    return weight.masked_fill(~keep, 0.0), keep, inputs.T @ inputs / len(inputs)


def params_of(scheme: str, symmetric: bool, method: str = "gptq", **numbers) -> QuantParams:
    size = 16 if get_scheme(scheme).has_groups else None
    return QuantParams(method, scheme, size, symmetric, **numbers)


def test_every_scheme_is_tried_here():
    assert {scheme for scheme, _ in CASES} == set(available_schemes())


@pytest.mark.parametrize(("scheme", "symmetric"), CASES)
def test_nearest_is_the_nearest_of_all_levels(scheme, symmetric):
    grid = get_scheme(scheme).grid(params_of(scheme, symmetric))
    zero = None if symmetric else 5
    levels = torch.tensor(levels_of(scheme, zero), dtype=torch.float64)
    scale = -0.37 if grid.has_both_signs else 0.37
    spread = float(levels.abs().max()) * 0.4
    values = torch.linspace(-spread, spread, 4001, dtype=torch.float64)
    zeros = None if zero is None else torch.tensor(float(zero), dtype=torch.float64)
    found = grid.nearest(values, torch.tensor(scale, dtype=torch.float64), zeros)
    best = (values[:, None] - levels * scale).abs().amin(1)
    assert torch.allclose((values - found * scale).abs(), best, atol=1e-6)
    assert not grid.nearest(values, torch.tensor(0.0), zeros).any()


@pytest.mark.parametrize(("scheme", "symmetric"), CASES)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_is_what_was_scored(scheme, symmetric, method, dtype):
    weight, keep, hessian = problem(seed=len(scheme))
    params = params_of(scheme, symmetric, method)
    got = quantize_weight(weight.to(dtype), keep, hessian, params, "layer")
    assert got.weight_OI.dtype == dtype
    assert not got.weight_OI[~keep].any()
    assert not torch.signbit(got.weight_OI[~keep]).any()
    assert got.codes.scheme == get_scheme(scheme).stored_as(params, 40)
    if not symmetric:
        at_zero = got.codes.zeros_OG.repeat_interleave(16, 1)[:, :40]
        assert torch.equal(got.codes.values_OI[~keep], at_zero[~keep])
    layer, parts = pack_layer("layer", got.weight_OI, keep, PATTERN, got.codes)
    assert torch.equal(unpack_layer(layer, parts, dtype), got.weight_OI)
    # From the codes alone, in double precision and plain arithmetic.
    levels = got.codes.values_OI.double()
    if scheme == "nf4":
        levels = torch.tensor(NF4, dtype=torch.float64)[got.codes.values_OI.int()]
    if not symmetric:
        levels = levels - at_zero.double()
    size = 16 if get_scheme(scheme).has_groups else 40
    scales = got.codes.scales_OG.double().repeat_interleave(size, 1)[:, :40]
    exact = levels * scales
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
    assert torch.allclose(got.weight_OI.double(), exact, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize(("scheme", "symmetric"), CASES)
def test_gptq_beats_nearest_and_no_single_change_of_a_level_helps(scheme, symmetric):
    weight, keep, hessian = problem(seed=3, num_rows=4, num_columns=16)
    weight, hessian = weight.double(), hessian.double()
    params = params_of(scheme, symmetric, num_refine_sweeps=100)
    got = quantize_weight(weight, keep, hessian, params, "layer")
    rtn = quantize_weight(weight, keep, None, params_of(scheme, symmetric, "rtn"), "layer")
    damped = hessian + torch.eye(16) * 0.01 * hessian.diagonal().mean()

    def energies(quantized: Tensor) -> Tensor:
        change = weight - quantized
        return ((change @ damped) * change).sum(1)

    exact = dequantize(got.codes, torch.float64)
    best = energies(exact)
    assert best.sum() < energies(dequantize(rtn.codes, torch.float64)).sum()
    for column, row in product(range(16), range(4)):
        if not keep[row, column]:
            continue
        zero = None if symmetric else int(got.codes.zeros_OG[row, 0])
        levels = torch.tensor(levels_of(scheme, zero), dtype=torch.float64)
        tried = exact[row].repeat(len(levels), 1)
        tried[:, column] = levels * got.codes.scales_OG[row, 0].double()
        change = weight[row] - tried
        assert (((change @ damped) * change).sum(1) >= best[row] * (1 - 1e-5)).all()


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_zero_points_pay_where_weights_are_not_centred(method):
    weight, keep, hessian = problem(seed=1, num_rows=64)
    weight = (weight.abs() + 0.5).masked_fill(~keep, 0.0)

    def error(symmetric: bool) -> float:
        got = quantize_weight(weight, keep, hessian, params_of("int4", symmetric, method), "layer")
        change = weight - got.weight_OI
        return float(((change @ hessian) * change).sum())

    assert error(symmetric=False) < 0.6 * error(symmetric=True)


def test_one_scale_a_channel_orders_all_columns():
    weight, keep, hessian = problem(seed=2)
    hessian = hessian * torch.linspace(0.5, 3, 40).outer(torch.linspace(0.5, 3, 40))
    channel = quantize_weight(weight, keep, hessian, QuantParams(group_size=-1), "layer")
    whole = quantize_weight(weight, keep, hessian, QuantParams(group_size=40), "layer")
    assert channel.codes.scheme == Scheme("int", 4, 40)
    assert torch.equal(channel.weight_OI, whole.weight_OI)
    # The order is by importance, so permuting the columns permutes the result.
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    permuted = quantize_weight(
        weight[:, order], keep[:, order], hessian[order][:, order], QuantParams(group_size=-1), "x"
    )
    assert torch.equal(permuted.codes.values_OI, channel.codes.values_OI[:, order])


def test_narrow_rows_have_smaller_groups_unless_told_otherwise():
    scheme = get_scheme("int4")
    sizes = {columns: scheme.group_size_of(QuantParams(), columns) for columns in (1023, 1024)}
    assert sizes == {1023: 32, 1024: 128}
    assert scheme.group_size_of(QuantParams(group_size=128), 256) == 128
    assert get_scheme("int8").group_size_of(QuantParams(scheme="int8"), 256) == 256


def test_the_scheme_says_what_engines_do_with_activations():
    assert get_scheme("w8a8").stored_as(QuantParams(), 64).activations == "int8"
    assert get_scheme("fp8").stored_as(QuantParams(), 64) == Scheme("fp8", activations="fp8")
    assert get_scheme("int8").stored_as(QuantParams(), 64) == Scheme("int", 8, 64)
    plain = Scheme("int", 8, 64)
    marked = Scheme("int", 8, 64, activations="int8")
    assert plain.name != marked.name
    assert "activations" not in plain.to_dict()
    assert Scheme(**marked.to_dict()) == marked
    for wrong in ({"type": "int", "bits": 4, "group_size": 8, "activations": "int8"},
                  {"type": "fp8", "activations": "int8"}, {"activations": "float"},
                  {"type": "int", "bits": 8, "group_size": 8, "symmetric": False,
                   "activations": "int8"}):  # fmt: skip
        with pytest.raises(InputError, match="activations="):
            Scheme(**wrong)


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CASES), rows=st.integers(1, 5), groups=st.integers(1, 9),
    size=st.sampled_from([-1, 4, 8, 12]), seed=st.integers(0, 99),
    method=st.sampled_from(["gptq", "rtn"]),
)  # fmt: skip
def test_any_shape_packs_to_the_bit(case, rows, groups, size, seed, method):
    scheme, symmetric = case
    weight, keep, hessian = problem(seed, rows, 4 * groups)
    known = get_scheme(scheme)
    params = QuantParams(method, scheme, size if known.has_groups else None, symmetric)
    got = quantize_weight(weight, keep, hessian, params, "layer")
    layer, parts = pack_layer("layer", got.weight_OI, keep, PATTERN, got.codes)
    assert torch.equal(unpack_layer(layer, parts, torch.float32), got.weight_OI)
    assert not got.weight_OI[~keep].any()


@pytest.mark.parametrize(("scheme", "symmetric"), CASES)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_empty_and_tiny_rows(scheme, symmetric, method):
    weight, keep, hessian = problem(seed=5)
    weight[2], weight[3] = 0, 1e-9
    weight = weight.masked_fill(~keep, 0.0)
    got = quantize_weight(weight, keep, hessian, params_of(scheme, symmetric, method), "layer")
    assert torch.isfinite(got.weight_OI).all()
    assert not got.weight_OI[2].any()
    assert (got.weight_OI[3].abs() < 1e-7).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "int3"}, "quantize.scheme=int3: unknown .*int4"),
        ({"scheme": "fp8", "group_size": 64}, "group_size=64 with quantize.scheme=fp8"),
        ({"scheme": "nf4", "symmetric": False}, "symmetric=false with quantize.scheme=nf4"),
        ({"group_size": -2}, "quantize.group_size=-2"),
        ({"group_size": 0}, "quantize.group_size=0"),
        ({"damping": math.nan}, "quantize.damping"),
    ],
)
def test_what_a_scheme_has_not_is_refused(changes, message):
    weight, keep, hessian = problem(seed=0)
    with pytest.raises(InputError, match=message):
        quantize_weight(weight, keep, hessian, QuantParams(**changes), "layer")
