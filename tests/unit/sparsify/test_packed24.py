"""The packed file: bit-equal round trips, exact sizes, and refused files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.errors import InputError, PatternViolationError
from sparsify.formats.packed24 import FORMAT, load_packed, pack_model, packed_num_bytes, save_packed
from sparsify.masks.bits import num_bytes, pack_bits, unpack_bits
from sparsify.masks.select import keep_mask_from_scores
from sparsify.pattern import Pattern
from sparsify.quantization import Quantized, QuantParams, quantize_weight

PATTERNS = ["2:4", "4:8", "1:4", "1:3", "3:16", "unstructured:0.5", "unstructured:0.37"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal down to the sign of zero and the payload of NaN."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(
            first.contiguous().reshape(-1).view(torch.uint8),
            second.contiguous().reshape(-1).view(torch.uint8),
        )
    )


def pruned_layer(
    pattern: Pattern, num_rows: int, num_columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator)
    keep = keep_mask_from_scores(torch.rand(weight.shape, generator=generator), pattern)
    return weight.to(dtype).masked_fill(~keep, 0), keep


def small_model(
    pattern: Pattern, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two pruned layers, a dense one, a vector, and a head tied to the embedding."""
    state: dict[str, Tensor] = {"embed.weight": torch.randn(10, 48).to(dtype)}
    masks = {}
    for name, shape in {"a.up": (6, 48), "a.down": (5, 96)}.items():
        state[f"{name}.weight"], masks[name] = pruned_layer(pattern, *shape, dtype)
    state["a.up.bias"] = torch.randn(6)
    state["a.gate.weight"] = torch.randn(6, 48).to(dtype)
    state["head.weight"] = state["embed.weight"]
    return state, masks


def quantised_model(
    pattern: Pattern, dtype: torch.dtype, group_size: int, bits: int = 4
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Quantized]]:
    state, masks = small_model(pattern, dtype)
    params = QuantParams("rtn", bits=bits, group_size=group_size)
    quantized = {}
    for name, keep in masks.items():
        quantized[name] = quantize_weight(state[f"{name}.weight"], keep, None, params, name)
        state[f"{name}.weight"] = quantized[name].weight_OI
    return state, masks, quantized


@given(
    bits=st.integers(1, 8),
    num_rows=st.integers(0, 4),
    num_values=st.integers(0, 21),
    seed=st.integers(0, 999),
)
def test_bits_round_trip(bits, num_rows, num_values, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(2**bits, (num_rows, num_values), generator=generator)
    packed = pack_bits(values, bits)
    assert packed.shape == (num_rows, num_bytes(num_values, bits))
    assert packed.shape[1] == math.ceil(num_values * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, num_values).long(), values)


def test_bit_order_is_pinned():
    """A file written today must mean the same tomorrow."""
    assert pack_bits(torch.tensor([[1, 2, 3, 0, 1]]), 2).tolist() == [[0b00_11_10_01, 0b01]]
    assert pack_bits(torch.tensor([[5, 6, 7]]), 3).tolist() == [[0b11_110_101, 0b1]]
    assert pack_bits(torch.tensor([[0xA, 0x3]]), 4).tolist() == [[0x3A]]
    with pytest.raises(ValueError, match="does not fit 2 bits"):
        pack_bits(torch.tensor([[4]]), 2)


def test_layout_is_pinned():
    """The bytes of one small layer, worked out by hand from the format's description."""
    weight = torch.tensor([[0, 1.5, -2, 0, 3, 0, 0, 4], [0, 0, 5, 6, 0, 7, 8, 0]])
    tensors, metadata = pack_model({"x.weight": weight}, {"x": weight != 0}, Pattern.parse("2:4"))
    assert set(tensors) == {"x.weight.values", "x.weight.indices"}
    assert tensors["x.weight.values"].tolist() == [[1.5, -2, 3, 4], [5, 6, 7, 8]]
    assert tensors["x.weight.indices"].tolist() == [[0b11_00_10_01], [0b10_01_11_10]]
    header = json.loads(metadata[FORMAT])
    assert header["version"] == "1"
    assert header["pattern"] == "2:4"
    entry = {"shape": [2, 8], "dtype": "float32", "bits": None, "group_size": None}
    assert header["layers"] == {"x": entry}


@settings(deadline=None, max_examples=60)
@given(
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(1, 9),
    num_groups=st.integers(1, 7),
    seed=st.integers(0, 999),
)
def test_values_round_trip(tmp_path_factory, pattern, dtype, num_rows, num_groups, seed):
    pattern = Pattern.parse(pattern)
    weight, keep = pruned_layer(pattern, num_rows, num_groups * (pattern.m or 3), dtype, seed)
    path = tmp_path_factory.mktemp("pack") / "model.packed"
    save_packed(path, {"x.weight": weight}, {"x": keep}, pattern)
    assert same_bits(load_packed(path)["x.weight"], weight)
    size = packed_num_bytes({"x.weight": weight}, ["x"], pattern)
    assert size == sum(tensor.nbytes for tensor in load_file(path).values())


@settings(deadline=None, max_examples=40)
@given(
    pattern=st.sampled_from(["2:4", "4:8", "1:4", "1:3", "unstructured:0.37"]),
    dtype=st.sampled_from(DTYPES),
    group_size=st.sampled_from([7, 16, 32, 128]),
    bits=st.sampled_from([2, 3, 4, 8]),
)
def test_codes_round_trip(tmp_path_factory, pattern, dtype, group_size, bits):
    pattern = Pattern.parse(pattern)
    state, masks, quantized = quantised_model(pattern, dtype, group_size, bits)
    path = tmp_path_factory.mktemp("pack") / "model.packed"
    save_packed(path, state, masks, pattern, quantized)
    loaded = load_packed(path)
    assert sorted(loaded) == sorted(state)
    assert all(same_bits(loaded[name], state[name]) for name in state)
    assert not any(name.endswith(".values") for name in load_file(path))
    size = packed_num_bytes(state, masks, pattern, bits, group_size)
    assert size == sum(tensor.nbytes for tensor in load_file(path).values())


def test_what_zero_and_nan_leave_no_doubt_about():
    """The mask says what survives: kept zeros of either sign, NaN and infinity come back."""
    pattern = Pattern.parse("2:4")
    kept = [0.0, -0.0, math.nan, -math.inf]
    weight = torch.tensor([[kept[0], 9, kept[1], 9, 9, kept[2], kept[3], 9]])
    keep = weight != 9
    weight = weight.masked_fill(~keep, 0)
    tensors, _ = pack_model({"x.weight": weight}, {"x": keep}, pattern)
    assert tensors["x.weight.values"].shape == (1, 4)
    assert same_bits(tensors["x.weight.values"], torch.tensor([kept]))


def test_whole_model_round_trips_and_ties_are_stored_once(tmp_path):
    pattern = Pattern.parse("2:4")
    state, masks = small_model(pattern)
    path = tmp_path / "model.packed"
    save_packed(path, state, masks, pattern)
    loaded = load_packed(path)
    assert sorted(loaded) == sorted(state)
    assert all(same_bits(loaded[name], state[name]) for name in state)
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
    stored = load_file(path)
    assert "head.weight" not in stored
    assert packed_num_bytes(state, masks, pattern) == sum(t.nbytes for t in stored.values())
    save_packed(tmp_path / "again.packed", loaded, masks, pattern)
    assert (tmp_path / "again.packed").read_bytes() == path.read_bytes()


def test_size_of_a_layer_is_the_formula():
    """2:4 stores n/m of the values and two bits each; codes add a scale per group."""
    shapes = {"x.weight": torch.empty(4096, 14336, dtype=torch.bfloat16, device="meta")}
    pattern, weights = Pattern.parse("2:4"), 4096 * 14336
    assert packed_num_bytes(shapes, ["x"], pattern) == weights * (16 + 2) // 16
    with_codes = weights // 2 * (4 + 2) // 8 + 4096 * 112 * 2
    assert packed_num_bytes(shapes, ["x"], pattern, bits=4, group_size=128) == with_codes
    half = Pattern.parse("unstructured:0.5")
    assert packed_num_bytes(shapes, ["x"], half) == weights * (8 + 1) // 8
    with pytest.raises(InputError, match="give both"):
        packed_num_bytes(shapes, ["x"], pattern, bits=4)


def packed_file(tmp_path):
    pattern = Pattern.parse("2:4")
    state, masks, quantized = quantised_model(pattern, torch.float32, 32)
    del quantized["a.down"]
    path = tmp_path / "model.packed"
    save_packed(path, state, masks, pattern, quantized)
    return path


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"packed file .*none\.packed: there is no such file"):
        load_packed(tmp_path / "none.packed")


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """Of a packed file, to damage."""
    return packed_file(tmp_path_factory.mktemp("pack")).read_bytes()


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0, 0.999))
def test_truncated_anywhere(content, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("pack") / "model.packed"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"packed file .*model\.packed: truncated or corrupt"):
        load_packed(path)


@settings(deadline=None, max_examples=150)
@given(share=st.floats(0, 0.999), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere(content, tmp_path_factory, share, bit):
    path = tmp_path_factory.mktemp("pack") / "model.packed"
    damaged = bytearray(content)
    damaged[int(len(damaged) * share)] ^= 1 << bit
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"packed file .*model\.packed: ") as caught:
        load_packed(path)
    assert "\n" not in str(caught.value)


def rewritten(path, **changes):
    """The same tensors under a header with other entries (and its old checksum)."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
    save_file(load_file(path), path, metadata={FORMAT: json.dumps({**header, **changes})})
    return path


def test_wrong_version(tmp_path):
    path = rewritten(packed_file(tmp_path), version="2")
    with pytest.raises(InputError, match="version '2' of the format, this program reads version"):
        load_packed(path)


def test_changed_header(tmp_path):
    path = rewritten(packed_file(tmp_path), aliases={"more": "embed.weight"})
    with pytest.raises(InputError, match="its checksum differs"):
        load_packed(path)


def test_other_safetensors_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="not a packed model"):
        load_packed(path)


def test_parts_of_unlike_runs_are_refused():
    pattern = Pattern.parse("2:4")
    state, masks, quantized = quantised_model(pattern, torch.float32, 32)
    with pytest.raises(InputError, match=r"layer a\.up has no mask"):
        pack_model(state, {"a.down": masks["a.down"]}, pattern, quantized)
    with pytest.raises(InputError, match="layer other has no weight"):
        pack_model(state, {**masks, "other": masks["a.up"]}, pattern)
    with pytest.raises(InputError, match=r"a\.up: .* masks and model are of different runs"):
        pack_model(state, {**masks, "a.up": masks["a.down"]}, pattern)
    with pytest.raises(InputError, match=r"a\.up: the mask keeps 2 of the 4 .* but 1:4 keeps 1"):
        pack_model(state, masks, Pattern.parse("1:4"))
    state["a.up.weight"] = state["a.up.weight"] * 1.001
    with pytest.raises(InputError, match=r"a\.up: .* changed after quantisation"):
        pack_model(state, masks, pattern, quantized)
    row, column = (~masks["a.up"]).nonzero()[0].tolist()
    state["a.up.weight"][row, column] = 1e-20
    with pytest.raises(PatternViolationError, match=rf"a\.up: .* row {row}, column {column}"):
        pack_model(state, masks, pattern)
    with pytest.raises(InputError, match=r"a\.up: 48 input columns cannot be cut"):
        packed_num_bytes(state, masks, Pattern.parse("2:5"))
    with pytest.raises(InputError, match=r"x\.weight is not a tensor of the model"):
        packed_num_bytes(state, ["x"], pattern)
    with pytest.raises(InputError, match="float64 cannot be packed"):
        pack_model({"a.up.weight": state["a.up.weight"].double()}, {"a.up": masks["a.up"]}, pattern)


@pytest.mark.parametrize("bits", [None, 4])
def test_rows_may_keep_unlike_numbers_where_no_pattern_orders_them(tmp_path, bits):
    """Half of a layer, as other programs prune: 0 to 48 of a row's 48 weights."""
    torch.manual_seed(0)
    pattern, weight = Pattern.parse("unstructured:0.5"), torch.randn(6, 48)
    keep = torch.zeros(6, 48, dtype=torch.bool)
    for row, count in enumerate((0, 48, 20, 28, 24, 24)):
        keep[row, torch.randperm(48)[:count]] = True
    weight = weight.masked_fill(~keep, 0)
    quantized = {}
    if bits is not None:
        params = QuantParams("rtn", bits=bits, group_size=16)
        quantized["x"] = quantize_weight(weight, keep, None, params, "x")
        weight = quantized["x"].weight_OI
    save_packed(tmp_path / "packed", {"x.weight": weight}, {"x": keep}, pattern, quantized)
    assert same_bits(load_packed(tmp_path / "packed")["x.weight"], weight)
    with pytest.raises(InputError, match=r"keeps 0 of the 48 .* but unstructured:0\.6 keeps 19"):
        pack_model({"x.weight": weight}, {"x": keep}, Pattern.parse("unstructured:0.6"), quantized)


def test_a_layer_of_nothing_but_zeros_is_packed(tmp_path):
    weight = torch.zeros(3, 8)
    pattern = Pattern.parse("unstructured:0.5")
    save_packed(tmp_path / "packed", {"x.weight": weight}, {"x": weight != 0}, pattern)
    assert same_bits(load_packed(tmp_path / "packed")["x.weight"], weight)
