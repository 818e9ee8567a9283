"""The kernels' order of a packed weight: there and back, to the bit, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import InputError
from sparsify.kernels.cpu.layout import KINDS, chunk_bytes, prepare, restore
from tests.numerics.test_packed_linear import Layer, random_layer


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)), rows=st.integers(1, 30), groups=st.integers(1, 60),
    with_zeros=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_comes_back_as_it_was(
    kind: str, rows: int, groups: int, with_zeros: bool, seed: int
) -> None:
    layer = random_layer(
        kind, rows, 4 * groups, 32, with_zeros and kind in ("int4", "int8"), seed
    )  # fmt: skip
    back = restore(kind, rows, 4 * groups, layer.prepared)
    for given_one, one in zip(layer.stored, back, strict=True):
        assert (given_one is None) == (one is None)
        if given_one is not None and one is not None:
            assert given_one.dtype == one.dtype
            assert torch.equal(given_one.view(torch.uint8), one.view(torch.uint8))


@pytest.mark.parametrize("kind", list(KINDS))
def test_is_no_larger_than_the_file(kind: str) -> None:
    layer = random_layer(kind, 16, 256, 64)
    stored = sum(t.nbytes for t in layer.stored if t is not None)
    assert sum(t.nbytes for t in layer.prepared if t is not None) == stored


def test_a_chunk_to_the_byte() -> None:
    """Row 2's second survivor of the fourth group is column 3 with code 11: where they lie."""
    indices = torch.full((8, 8), 0x44, dtype=torch.uint8)
    indices[2, 1] = 0xC4  # groups 2 and 3; 0xC: survivors 0 and 3
    weight = torch.full((8, 16), 0x88, dtype=torch.uint8)
    weight[2, 3] = 0xB8  # survivors 6 and 7
    blocks, _, _ = prepare("int4", 64, weight, indices, torch.ones(8, 1).half())
    assert blocks.shape == (1, 1, 192) and chunk_bytes("int4") == 192
    lane = 2 * 2 + 1
    positions = blocks[0, 0, :64].view(torch.int32)
    assert [int(positions[lane]) >> 2 * step & 3 for step in range(5)] == [1, 1, 1, 3, 1]
    codes = blocks[0, 0, 64:128].view(torch.int32)
    assert [int(codes[lane]) >> 28 - 4 * step & 15 for step in range(5)] == [0, 0, 0, 11 - 8, 0]
    assert int(codes.count_nonzero()) == 1 and not blocks[0, 0, 128:].any()


def changed(layer: Layer, **changes: object) -> None:
    layer = layer._replace(**changes)
    prepare(layer.kind, layer.num_columns, *layer.stored)


class TestRefusals:
    def test_what_does_not_belong_together(self) -> None:
        layer = random_layer("int4", 8, 64, 32)
        for changes, words in (
            ({"kind": "int3"}, "unknown kind int3; use one of: float32"),
            ({"num_columns": 66}, "66 columns; 2:4 needs a multiple of 4"),
            ({"num_columns": 128}, r"weight is torch.uint8 \(8, 16\); int4 with 128 columns needs"),
            ({"indices": layer.indices[:, 1:]}, r"indices is torch.uint8 \(8, 7\)"),
            ({"scales": None}, "int4 values need scales"),
            ({"scales": torch.ones(8, 2)}, r"scales is torch.float32 \(8, 2\)"),
            ({"zeros": torch.ones(8, 1, dtype=torch.uint8)}, r"zeros is torch.uint8 \(8, 1\)"),
            ({"kind": "nf4", "zeros": layer.indices}, "nf4 values take no zeros"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=words):
                changed(layer, **changes)

    def test_scales_of_floats(self) -> None:
        layer = random_layer("bfloat16", 8, 64, 64)
        with pytest.raises(InputError, match="bfloat16 values take no scales"):
            changed(layer, scales=torch.ones(8, 1))

    def test_a_float8_that_is_no_number(self) -> None:
        layer = random_layer("float8", 8, 64, 64)
        layer.weight[3, 2] = float("nan")
        with pytest.raises(InputError, match="a float8 weight is NaN"):
            changed(layer)
