"""What each process of a tensor-parallel server holds, without vLLM."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.errors import InputError
from sparsify.integrations.vllm.shares import fused_layer, may_copy, share_of
from sparsify.masks.select import keep_mask_from_scores
from sparsify.packed.layer import DTYPE_NAMES, pack_layer, unpack_layer
from sparsify.packed.layout import Layer, Scheme
from sparsify.pattern import Pattern
from tests.conftest import message
from tests.unit.sparsify.test_packed import coded

TWO_FOUR = Pattern.parse("2:4")

SCHEMES = [
    Scheme(), Scheme("fp8"), Scheme("nf4", 4, 16), Scheme("int", 4, 8), Scheme("int", 4, 40, False),
    Scheme("int", 8, 32), Scheme("int", 8, 1024, False),
]  # fmt: skip


def packed(shape: tuple[int, int], scheme: Scheme, pattern: Pattern) -> tuple[Tensor, Layer, dict]:
    generator = torch.Generator().manual_seed(3)
    keep = keep_mask_from_scores(torch.rand(shape, generator=generator), pattern)
    weight, codes = torch.randn(shape, generator=generator).masked_fill(~keep, 0), None
    if scheme.has_codes:
        weight, codes = coded(scheme, keep, torch.float32)
    return weight, *pack_layer("x", weight, keep, pattern, codes)


@given(
    st.sampled_from(SCHEMES), st.sampled_from(["2:4", "1:4", "4:8", "1:3"]), st.integers(1, 40),
    st.sampled_from([1, 2, 3, 4, 8]), st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_shares_are_the_weight_s_own_rows_and_columns(scheme, pattern, units, size, by_columns):
    """Cut as vLLM cuts tensors, by their own widths, each share unpacks to a cut of the weight."""
    pattern = Pattern.parse(pattern)
    num_rows, num_columns = 24, pattern.m * units
    if by_columns and num_columns % size:
        return
    weight, whole, parts = packed((num_rows, num_columns), scheme, pattern)
    rows, columns = (num_rows, num_columns // size) if by_columns else (24 // size, num_columns)
    if by_columns and _crosses(whole, size):
        with pytest.raises(InputError, match=f"tensor parallel size {size} "):
            share_of("x", whole, rows, columns)
        return
    share = share_of("x", whole, rows, columns)
    for rank in range(size):
        cut = {}
        for name, (dtype, shape) in share.parts("F32").items():
            start = rank * shape[1] if by_columns else 0
            if by_columns and whole.num_groups == 1 and name in ("weight_scales", "weight_zeros"):
                start = 0
            first = 0 if by_columns else rank * rows
            cut[name] = parts[name][first : first + shape[0], start : start + shape[1]]
            assert DTYPE_NAMES[cut[name].dtype] == dtype and tuple(cut[name].shape) == shape
        left, top = (rank * columns, 0) if by_columns else (0, rank * rows)
        expected = weight[top : top + rows, left : left + columns]
        assert torch.equal(unpack_layer(share, cut, torch.float32), expected)


def _crosses(whole: Layer, size: int) -> bool:
    """Whether a cut of the columns falls within something, found by counting bits to it."""
    pattern, scheme = whole.pattern, whole.scheme
    bits = (pattern.m - 1).bit_length()
    for cut in range(whole.shape[1] // size, whole.shape[1], whole.shape[1] // size):
        survivors = sum(1 for column in range(cut) if column % pattern.m < pattern.n)
        within_scale = whole.num_groups > 1 and cut % scheme.group_size
        in_byte = survivors * bits % 8 or (scheme.bits == 4 and survivors * 4 % 8)
        if cut % pattern.m or in_byte or within_scale:
            return True
    return False


def layer(num_columns: int, scheme: Scheme | None = None, pattern: str = "2:4") -> Layer:
    return Layer((8, num_columns), scheme or Scheme(), Pattern.parse(pattern))


@pytest.mark.parametrize(("given", "num_columns", "said"), [
    (layer(24), 6, r"size 4 gives a process 6 of 24 columns, which cuts a group of 2:4; use "
                   "--tensor-parallel-size 1 or 3$"),
    (layer(24), 12, r"cuts a byte of positions; use --tensor-parallel-size 1$"),
    (layer(24, pattern="1:8"), 8, r"size 3 .* cuts a byte of positions"),
    (layer(512, Scheme("int", 4, 128)), 64, r"cuts a group of 128 columns that share a scale; use "
                                            "--tensor-parallel-size 1 or 2 or 4$"),
    (layer(96, Scheme("int", 8, 64)), 48, r"cuts a group of 64 columns that share a scale"),
    (layer(96), 36, "packed with 96 columns, which are no multiple of the 36"),
    (layer(48), 96, "packed with 48 columns, which are no multiple of the 96"),
])  # fmt: skip
def test_what_would_be_cut_is_refused(given, num_columns, said):
    with pytest.raises(InputError, match=f"m.down_proj: .*{said}") as caught:
        share_of("m.down_proj", given, 8, num_columns)
    message(caught)


def test_one_process_takes_any_width():
    odd = layer(44, Scheme("int", 4, 24))
    assert share_of("x", odd, 8, 44) == odd


def test_fused_layers_are_their_parts_one_below_the_other():
    scheme = Scheme("int", 4, 32)
    parts = {"q": Layer((64, 96), scheme, TWO_FOUR), "k": Layer((16, 96), scheme, TWO_FOUR)}
    assert fused_layer("qk", parts) == Layer((80, 96), scheme, TWO_FOUR)
    assert fused_layer("q", {"q": parts["q"]}) == parts["q"]
    assert fused_layer("qk", {"q": None, "k": None}) is None


@pytest.mark.parametrize(("other", "said"), [
    (None, "k_proj is dense"),
    (Layer((16, 96), Scheme("int", 8, 32), TWO_FOUR), "k_proj is int8-g32 of 96 columns"),
    (Layer((16, 96), Scheme("int", 4, 32, False), TWO_FOUR), "k_proj is int4-g32-asym"),
])  # fmt: skip
@pytest.mark.parametrize("is_first", [False, True])
def test_parts_that_are_stored_in_different_ways_are_refused(other, said, is_first):
    parts = {"q_proj": Layer((64, 96), Scheme("int", 4, 32), TWO_FOUR), "k_proj": other}
    if is_first:
        parts = dict(reversed(parts.items()))
    with pytest.raises(InputError, match=said) as caught:
        fused_layer("m.qkv_proj", parts)
    text = message(caught)
    assert text.startswith("m.qkv_proj: ") and "q_proj is int4-g32 of 96 columns" in text


@pytest.mark.parametrize(("given", "expected"), [
    ({}, False), ({"other": 1}, False), ({"twofour": {}}, False), (object(), False),
    ({"twofour": {"may_copy": False}}, False), ({"twofour": {"may_copy": True}}, True),
])  # fmt: skip
def test_a_copy_beside_the_packed_weight_is_held_where_the_server_was_told_so(given, expected):
    assert may_copy(given) is expected


@pytest.mark.parametrize(("given", "said"), [
    (True, "twofour is True; it knows {'may_copy': true} alone"),
    ({"may_coppy": True}, "twofour is {'may_coppy': True}; it knows {'may_copy': true} alone"),
    ({"may_copy": "yes"}, "twofour.may_copy is 'yes'; give true or false"),
])  # fmt: skip
def test_what_the_method_does_not_know_is_refused(given, said):
    with pytest.raises(InputError) as caught:
        may_copy({"twofour": given})
    assert message(caught) == f"additional-config: {said}"
