"""8-bit float layers: rounding within its bound, and a teacher that stays the teacher."""

from __future__ import annotations

import torch
from torch import nn

from sparsify.models.float8 import Float8Linear, quantized, to_float8_
from sparsify.models.load import load_model


def test_every_element_is_within_half_a_unit_of_its_last_place() -> None:
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).double()
    rounded, scale = quantized(values)
    back = rounded.double() * scale
    largest = values.abs().amax(dim=1, keepdim=True)
    # Three bits of mantissa: half a unit of the last place is 2^-4; below float8's normal numbers
    # the distance between neighbours is 2^-9 of the scale.
    bound = torch.maximum(values.abs() * 2**-4, largest / 448 * 2**-10) * (1 + 1e-6)
    assert ((back - values).abs() <= bound).all()
    assert torch.equal(rounded.double().abs().amax(dim=1), torch.full((64,), 448.0).double())


def test_zeros_stay_zeros_and_a_row_of_zeros_is_no_division_by_zero() -> None:
    values = torch.zeros(2, 8)
    values[1, 3] = -2.0
    rounded, scale = quantized(values)
    assert torch.equal(rounded.float() * scale, values)


def test_a_layer_computes_what_its_rounded_weight_says() -> None:
    linear = nn.Linear(32, 16)
    x = torch.randn(3, 5, 32)
    layer = Float8Linear(linear)
    weight = layer.weight.float() * layer.scale
    assert torch.equal(layer(x), nn.functional.linear(x, weight, linear.bias))


def test_only_the_linears_of_blocks_change(tiny_model_dir) -> None:
    model = load_model(tiny_model_dir).eval()
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits.log_softmax(-1)
        num_layers = to_float8_(model)
        after = model(input_ids=ids).logits.log_softmax(-1)
    assert num_layers == 14
    assert isinstance(model.lm_head, nn.Linear)
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert 0 < kl < 1e-3, "near its teacher, and not the same"
