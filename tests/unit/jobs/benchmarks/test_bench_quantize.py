"""The benchmark of quantisation: its rows are what they say, and its bits are the format's."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.benchmarks.quantize import VARIANTS, measure, table_of
from sparsify.masks.select import keep_mask_from_scores
from sparsify.models.structure import find_blocks, linears_of
from sparsify.params import QuantParams
from sparsify.pattern import Pattern
from sparsify.quantization.schemes import available_schemes, get_scheme


def test_every_variant_is_one_that_can_be_made() -> None:
    for params in VARIANTS.values():
        get_scheme(params.scheme).check(params)
    # w8a8 has the weights of int8 with one scale a channel.
    assert {p.scheme for p in VARIANTS.values()} | {"w8a8"} == set(available_schemes())


def test_a_row_is_scored_beside_the_model_as_it_was(tiny_model: Any, tiny_rows: Any) -> None:
    masks = {}
    list_name, blocks = find_blocks(tiny_model)
    for index, block in enumerate(blocks):
        for name, layer in linears_of(block).items():
            keep = keep_mask_from_scores(layer.weight.detach().abs(), Pattern.parse("2:4"))
            layer.weight.data.masked_fill_(~keep, 0.0)
            masks[f"{list_name}.{index}.{name}"] = keep
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    int8, rtn = (
        measure(tiny_model, tiny_rows[:4], tiny_rows[4:8], masks, params, 4)
        for params in (QuantParams("rtn", "int8"), QuantParams("rtn", num_scale_steps=2))
    )
    assert all((value == before[name]).all() for name, value in tiny_model.state_dict().items())
    assert 0 < int8["kl"] < rtn["kl"]
    assert 5 < int8["bits"] < 6  # 8 / 2 + 2 / 2, and a scale for rows of a few dozen columns
    figures = {"perplexity": 4.0, "int8": {**int8, "perplexity": 4.1, "seconds": 2.0}}
    assert table_of(figures).rows[0][:2] == ["int8", "+2.50%"]
    assert rtn["bits"] == pytest.approx(4 / 2 + 2 / 2 + 16 / 32)
