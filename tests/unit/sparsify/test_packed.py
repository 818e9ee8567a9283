"""The packed format: bit-equal round trips, exact sizes, and what is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.errors import InputError, PatternViolationError
from sparsify.masks.bits import num_bytes, pack_bits, unpack_bits
from sparsify.masks.select import keep_mask_from_scores
from sparsify.packed.folder import INDEX, PackedFolder, open_packed, write_index
from sparsify.packed.layer import (
    DTYPES,
    NF4,
    Codes,
    keep_mask_of,
    pack_layer,
    packed_num_bytes,
    unpack_layer,
    unpack_tiles,
)
from sparsify.packed.layout import Contents, Layer, Scheme
from sparsify.packed.writer import PackedWriter
from sparsify.pattern import Pattern
from sparsify.quantization import QuantParams, quantize_weight
from tests.conftest import message

PATTERNS = ["2:4", "4:8", "1:4", "1:3", "3:16", "unstructured:0.5", "unstructured:0.37"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CODED = [
    Scheme("int", 4, 7), Scheme("int", 4, 128), Scheme("int", 8, 32), Scheme("int", 4, 20, False),
    Scheme("int", 8, 7, False), Scheme("nf4", 4, 16), Scheme("fp8"),
]  # fmt: skip
TWO_FOUR = Pattern.parse("2:4")


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


def pruned(
    pattern: Pattern, num_rows: int, num_columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator)
    keep = keep_mask_from_scores(torch.rand(weight.shape, generator=generator), pattern)
    return weight.to(dtype).masked_fill(~keep, 0), keep


def coded(scheme: Scheme, keep: Tensor, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Codes]:
    """A weight and its codes; what they mean is worked out here, in float64."""
    generator = torch.Generator().manual_seed(seed)
    size = scheme.group_size or keep.shape[1]
    shape = (keep.shape[0], -(-keep.shape[1] // size))
    scales = torch.randn(shape, generator=generator) / 8
    scales = scales.half() if scheme.has_codes and scheme.type != "fp8" else scales.abs()
    zeros, high = None, 2 ** (scheme.bits or 1)
    if scheme.type == "fp8":
        values = torch.randn(keep.shape, generator=generator).to(torch.float8_e4m3fn)
        numbers = values.double()
    elif scheme.type == "nf4":
        values = torch.randint(16, keep.shape, generator=generator).to(torch.uint8)
        numbers = torch.tensor(NF4).double()[values.long()]
    elif scheme.symmetric:
        values = torch.randint(-high // 2, high // 2, keep.shape, generator=generator)
        values, numbers = values.to(torch.int8), values.double()
    else:
        values = torch.randint(high, keep.shape, generator=generator).to(torch.uint8)
        zeros = torch.randint(high, shape, generator=generator).to(torch.uint8)
        numbers = values.double() - zeros.double().repeat_interleave(size, 1)[:, : keep.shape[1]]
    spread = scales.double().repeat_interleave(size, 1)[:, : keep.shape[1]]
    weight = (numbers * spread).float().to(dtype) + 0.0
    return weight.masked_fill(~keep, 0), Codes(values, scales, scheme, zeros)


def packed_folder(
    folder: Path, pattern: Pattern = TWO_FOUR, shard_bytes: int = 10**9
) -> dict[str, Tensor]:
    """Layers of values and of codes, a dense matrix, a vector and integers; returns the weights."""
    writer, layers, dense = PackedWriter(folder, shard_bytes), {}, {}
    for name, shape, scheme in (
        ("a.up", (6, 48), None), ("a.down", (5, 96), Scheme("int", 4, 32)),
        ("b.up", (6, 48), Scheme("fp8")), ("b.down", (5, 96), Scheme("int", 8, 96, False)),
    ):  # fmt: skip
        weight, keep = pruned(pattern, *shape, torch.float32)
        codes = None
        if scheme is not None:
            weight, codes = coded(scheme, keep, torch.float32)
        layers[name], parts = pack_layer(name, weight, keep, pattern, codes)
        writer.add({f"{name}.{part}": tensor for part, tensor in parts.items()})
        dense[f"{name}.weight"] = weight
    for name, tensor in {
        "embed.weight": torch.randn(10, 48).bfloat16(), "a.up.bias": torch.randn(6),
        "steps": torch.arange(3), "none": torch.zeros(0, 4),
    }.items():  # fmt: skip
        writer.add({name: tensor})
        dense[name] = tensor
    config = Contents(pattern, layers).to_dict()
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    writer.finish(config)
    return dense


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
    _, parts = pack_layer("x", weight, weight != 0, TWO_FOUR)
    assert parts["weight"].tolist() == [[1.5, -2, 3, 4], [5, 6, 7, 8]]
    assert parts["weight_indices"].tolist() == [[0b11_00_10_01], [0b10_01_11_10]]
    assert list(parts) == ["weight", "weight_indices"]
    weight = torch.tensor([[0, 1, -2, 0, 3, 0, 0, 4], [0, 0, 5, -6, 0, 7, -8, 0]])
    codes = Codes(weight.to(torch.int8), torch.ones(2, 1).half(), Scheme("int", 4, 8))
    _, parts = pack_layer("x", weight.float(), weight != 0, TWO_FOUR, codes)
    assert parts["weight"].tolist() == [[0x69, 0xCB], [0x2D, 0x0F]]
    assert list(parts) == ["weight", "weight_indices", "weight_scales"]


@settings(deadline=None, max_examples=80)
@given(
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(FLOATS),
    num_rows=st.integers(1, 9),
    num_groups=st.integers(1, 7),
    seed=st.integers(0, 999),
)
def test_values_round_trip(pattern, dtype, num_rows, num_groups, seed):
    pattern = Pattern.parse(pattern)
    weight, keep = pruned(pattern, num_rows, num_groups * (pattern.m or 3), dtype, seed)
    layer, parts = pack_layer("x", weight, keep, pattern)
    assert same_bits(unpack_layer(layer, parts, dtype), weight)
    assert torch.equal(keep_mask_of(layer, parts), keep)
    size = packed_num_bytes({"x.weight": weight}, ["x"], pattern)
    assert size == sum(tensor.nbytes for tensor in parts.values())


@settings(deadline=None, max_examples=120)
@given(
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(FLOATS),
    scheme=st.sampled_from(CODED),
    num_rows=st.integers(1, 6),
    num_groups=st.integers(1, 7),
    seed=st.integers(0, 999),
)
def test_codes_round_trip(pattern, dtype, scheme, num_rows, num_groups, seed):
    pattern = Pattern.parse(pattern)
    _, keep = pruned(pattern, num_rows, num_groups * (pattern.m or 3), dtype, seed)
    weight, codes = coded(scheme, keep, dtype, seed)
    layer, parts = pack_layer("x", weight, keep, pattern, codes)
    assert same_bits(unpack_layer(layer, parts, dtype), weight)
    assert torch.equal(keep_mask_of(layer, parts), keep)
    told = layer.parts(num_survivors=int(keep.sum()))
    assert told.keys() == parts.keys()
    for name, (stored, shape) in told.items():
        assert (parts[name].dtype, tuple(parts[name].shape)) == (DTYPES[stored], shape)
    size = packed_num_bytes({"x.weight": weight}, ["x"], pattern, scheme)
    assert size == sum(tensor.nbytes for tensor in parts.values())


@settings(deadline=None, max_examples=40)
@given(scheme=st.sampled_from([None, *CODED]), cuts=st.lists(st.integers(1, 5), max_size=3))
def test_rows_of_fused_layers_are_those_of_their_parts(scheme, cuts):
    """q, k and v packed apart and put below each other are qkv packed: rows do not mix."""
    heights = [2, *cuts]
    _, keep = pruned(TWO_FOUR, sum(heights), 48, torch.float32)
    weight, codes = pruned(TWO_FOUR, sum(heights), 48, torch.float32)[0], None
    if scheme is not None:
        weight, codes = coded(scheme, keep, torch.float32)
    _, whole = pack_layer("qkv", weight, keep, TWO_FOUR, codes)
    pieces = []
    for rows in torch.arange(sum(heights)).split(heights):
        part = None
        if codes is not None:
            zeros = None if codes.zeros_OG is None else codes.zeros_OG[rows]
            part = Codes(codes.values_OI[rows], codes.scales_OG[rows], codes.scheme, zeros)
        pieces.append(pack_layer("q", weight[rows], keep[rows], TWO_FOUR, part)[1])
    for name, tensor in whole.items():
        assert same_bits(torch.cat([piece[name] for piece in pieces]), tensor)


@pytest.mark.parametrize("scheme", [None, *CODED])
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "unstructured:0.37"])
def test_tiles_are_rows_of_the_whole(pattern, scheme):
    """Odd places too: an unstructured row may begin in the middle of a byte of codes."""
    pattern = Pattern.parse(pattern)
    weight, keep = pruned(pattern, 7, 24, torch.float32)
    codes = None
    if scheme is not None:
        weight, codes = coded(scheme, keep, torch.float32)
    layer, parts = pack_layer("x", weight, keep, pattern, codes)
    tiles = list(unpack_tiles(layer, parts, torch.float32, elements=50))
    assert len(tiles) == 4
    assert same_bits(torch.cat([tile for _, tile in tiles]), weight)


def test_what_zero_and_nan_leave_no_doubt_about():
    """The mask says what survives: kept zeros of either sign, NaN and infinity come back."""
    kept = [0.0, -0.0, math.nan, -math.inf]
    weight = torch.tensor([[kept[0], 9, kept[1], 9, 9, kept[2], kept[3], 9]])
    keep = weight != 9
    weight = weight.masked_fill(~keep, 0)
    layer, parts = pack_layer("x", weight, keep, TWO_FOUR)
    assert parts["weight"].shape == (1, 4)
    assert same_bits(parts["weight"], torch.tensor([kept]))
    assert same_bits(unpack_layer(layer, parts, torch.float32), weight)


def test_codes_of_today_are_packed():
    """What the quantiser makes: symmetric codes, scales of groups of columns."""
    weight, keep = pruned(TWO_FOUR, 6, 48, torch.bfloat16)
    for bits in (4, 8):
        found = quantize_weight(weight, keep, None, QuantParams("rtn", f"int{bits}", 20), "x")
        assert found.codes.scheme == Scheme("int", bits, 20)
        layer, parts = pack_layer("x", found.weight_OI, keep, TWO_FOUR, found.codes)
        assert same_bits(unpack_layer(layer, parts, torch.bfloat16), found.weight_OI)
        assert parts["weight"].dtype == (torch.uint8 if bits == 4 else torch.int8)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (None, 9.0),
        (Scheme("fp8"), 5.0),
        (Scheme("int", 8, 14336), 5.0),
        (Scheme("int", 4, 128), 3.125),
    ],
)
def test_size_of_a_layer_is_the_arithmetic(scheme, bits):
    """2:4 stores half of the values and two bits each; codes add a scale for each group."""
    shapes = {"x.weight": torch.empty(4096, 14336, dtype=torch.bfloat16, device="meta")}
    size = packed_num_bytes(shapes, ["x"], TWO_FOUR, scheme)
    assert size * 8 == pytest.approx(bits * 4096 * 14336, rel=0.002)
    half = Pattern.parse("unstructured:0.5")
    assert packed_num_bytes(shapes, ["x"], half) == 4096 * 14336 * (8 + 1) // 8


def test_size_on_the_disk_is_within_two_percent(tmp_path):
    """Of a folder, headers and index included."""
    weight, keep = pruned(TWO_FOUR, 512, 2048, torch.bfloat16)
    layer, parts = pack_layer("x", weight, keep, TWO_FOUR)
    writer = PackedWriter(tmp_path, 10**9)
    writer.add({f"x.{name}": part for name, part in parts.items()})
    writer.finish(Contents(TWO_FOUR, {"x": layer}).to_dict())
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size * 8 == pytest.approx(9 * 512 * 2048, rel=0.02)


@pytest.mark.parametrize("shard_bytes", [10**9, 700, 1])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured:0.5"])
def test_a_folder_round_trips_in_any_number_of_shards(tmp_path, shard_bytes, pattern):
    dense = packed_folder(tmp_path, Pattern.parse(pattern), shard_bytes)
    packed = PackedFolder(tmp_path)
    assert len(packed.files) == {10**9: 1, 700: 5, 1: 8}[shard_bytes]
    packed.check_bytes()
    assert packed.shapes() == {name: tuple(tensor.shape) for name, tensor in dense.items()}
    for name, tensor in dense.items():
        assert same_bits(packed.dense(name), tensor), name
    names = [f"model-{n:05d}-of-{len(packed.files):05d}.safetensors" for n in range(1, 9)]
    assert [path.name for path in packed.files] == names[: len(packed.files)]
    stored = {name: part for path in packed.files for name, part in load_file(path).items()}
    assert sorted(packed) == sorted(stored)


def test_equal_models_give_equal_bytes(tmp_path):
    torch.manual_seed(0)
    packed_folder(tmp_path / "one", shard_bytes=700)
    torch.manual_seed(0)
    packed_folder(tmp_path / "two", shard_bytes=700)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A packed folder of several shards, to damage copies of."""
    folder = tmp_path_factory.mktemp("packed") / "whole"
    packed_folder(folder, shard_bytes=700)
    return folder


def refusal(folder: Path) -> str:
    """How the folder is refused, by opening it or by comparing its bytes."""
    with pytest.raises(InputError) as caught:
        PackedFolder(folder).check_bytes()
    return message(caught)


def owner(folder: Path, file: str, byte: int) -> str:
    """The tensor that a byte of a file belongs to, or its header, from the file alone."""
    content = (folder / file).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    if byte < start:
        return f"header of {file}"
    entries = json.loads(content[8:start])
    return next(
        f"tensor {name} "
        for name, entry in entries.items()
        if name != "__metadata__"
        and entry["data_offsets"][0] <= byte - start < entry["data_offsets"][1]
    )


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_refused_by_name(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(whole, folder)
    file = data.draw(st.sampled_from(sorted(p.name for p in whole.glob("*.safetensors"))))
    content = bytearray((folder / file).read_bytes())
    byte = data.draw(st.integers(0, len(content) - 1))
    content[byte] ^= 1 << data.draw(st.integers(0, 7))
    (folder / file).write_bytes(content)
    assert owner(whole, file, byte) in refusal(folder) + " "


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_a_file_that_was_cut_anywhere_is_refused_by_name(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(whole, folder)
    file = data.draw(st.sampled_from(sorted(p.name for p in whole.glob("*.safetensors"))))
    content = (folder / file).read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    (folder / file).write_bytes(content[:length])
    found = refusal(folder)
    assert owner(whole, file, length).strip() in found
    assert file in found


@settings(deadline=None, max_examples=150)
@given(data=st.data(), name=st.sampled_from([INDEX, "config.json"]))
def test_one_flipped_bit_of_what_describes_it_is_refused(whole, tmp_path_factory, data, name):
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(whole, folder)
    content = bytearray((folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    assert str(folder) in refusal(folder)


def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_missing_and_longer_files_are_refused_by_name(whole, tmp_path):
    folder = copied(whole, tmp_path)
    path = folder / "model-00002-of-00005.safetensors"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert "model-00002-of-00005.safetensors is longer than it was written" in refusal(folder)
    path.unlink()
    assert "model-00002-of-00005.safetensors is missing" in refusal(folder)
    (folder / INDEX).unlink()
    assert f"{INDEX} is missing" in refusal(folder)


def rewritten(folder: Path, change) -> Path:
    """The folder with other tensors, and an index that is right about them."""
    tensors = {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    write_index(folder, ["model-00001-of-00001.safetensors"], config)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("a.up.weight"), r"tensor a\.up\.weight is missing"),
        (lambda t: t.pop("a.up.weight_indices"), r"tensor a\.up\.weight_indices is missing"),
        (lambda t: t.pop("b.down.weight_zeros"), r"tensor b\.down\.weight_zeros is missing"),
        (lambda t: t.update({"a.down.weight_scales": torch.ones(5, 3)}),
         r"tensor a\.down\.weight_scales is \(5, 3\) of F32 where int4-g32 .* \(5, 3\) of F16"),
        (lambda t: t.update({"a.down.weight": t["a.down.weight"][:, 1:].contiguous()}),
         r"tensor a\.down\.weight is \(5, 23\) of U8 where int4-g32 .* has \(5, 24\) of U8"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(whole, tmp_path, change, said):
    folder = rewritten(copied(whole, tmp_path), change)
    with pytest.raises(InputError, match=said) as caught:
        PackedFolder(folder)
    message(caught)


def test_positions_that_no_mask_has_are_refused_by_layer_row_and_group(whole, tmp_path):
    def repeat(tensors):
        tensors["a.up.weight_indices"][3, 2] = 0b01_01_10_01

    folder = rewritten(copied(whole, tmp_path), repeat)
    with pytest.raises(InputError, match=r"a\.up\.weight_indices: row 3, group 5: .*\[1, 1\]"):
        PackedFolder(folder).keep_mask("a.up")


def test_other_versions_are_refused(whole, tmp_path):
    folder = copied(whole, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for version, said in (
        (3, "version 3 of the packed format, this program reads version 2; use a newer twofour"),
        (1, "version 1 of the packed format, .* export the model again"),
        ("2", "version '2' of the packed format"), (None, "version None of the packed format"),
    ):  # fmt: skip
        config["quantization_config"]["version"] = version
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=said):
            PackedFolder(folder)


def test_the_first_version_is_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.packed.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"version 1 of the packed format.*export the model again"):
        open_packed(tmp_path)


def test_what_is_not_packed_is_none(tmp_path):
    assert open_packed(tmp_path) is None
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    assert open_packed(tmp_path) is None
    with pytest.raises(InputError, match="quant_method is 'fp8'"):
        PackedFolder(tmp_path)


def test_a_layer_that_is_not_pruned_is_refused_by_row_and_group():
    weight, keep = pruned(TWO_FOUR, 6, 48, torch.float32)
    weight[4, 20:24] = 1
    said = r"a\.up: row 4, group 5 \(columns 20 to 23\) holds 4 nonzero .* where 2:4 keeps 2"
    with pytest.raises(PatternViolationError, match=said):
        pack_layer("a.up", weight, keep, TWO_FOUR)


def test_parts_of_unlike_runs_are_refused():
    weight, keep = pruned(TWO_FOUR, 6, 48, torch.float32)
    row, column = (~keep).nonzero()[7].tolist()
    with pytest.raises(InputError, match=r"x: .* masks and model are of different runs"):
        pack_layer("x", weight, keep[:5], TWO_FOUR)
    with pytest.raises(InputError, match=r"x: the mask keeps 2 of the 4 .* but 3:4 keeps 3"):
        pack_layer("x", weight, keep, Pattern.parse("3:4"))
    with pytest.raises(InputError, match=r"x: 48 input columns cannot be cut"):
        pack_layer("x", weight, keep, Pattern.parse("2:5"))
    with pytest.raises(InputError, match=r"x\.weight is not a tensor of the model"):
        packed_num_bytes({}, ["x"], TWO_FOUR)
    with pytest.raises(InputError, match="float64 cannot be packed"):
        pack_layer("x", weight.double(), keep, TWO_FOUR)
    rounded, codes = coded(Scheme("int", 4, 16), keep, torch.float32)
    with pytest.raises(InputError, match=r"x: .* changed after quantisation"):
        pack_layer("x", rounded * 1.5, keep, TWO_FOUR, codes)
    wrong = Codes(codes.values_OI, codes.scales_OG, Scheme("int", 4, 48))
    with pytest.raises(InputError, match=r"x: scales are \(6, 3\) .* int4-g48 has \(6, 1\)"):
        pack_layer("x", rounded, keep, TWO_FOUR, wrong)
    weight = weight.masked_fill(keep, 0)
    weight[row, column] = 1e-20
    said = rf"x: the pruned weight at row {row}, group {column // 4}, column {column}"
    with pytest.raises(PatternViolationError, match=said):
        pack_layer("x", weight, keep, TWO_FOUR)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"type": "int2"}, "not one of float, fp8, int, nf4"),
        ({"type": "int", "bits": 3, "group_size": 8}, "bits=3: codes of type int have 4 or 8"),
        ({"type": "int", "bits": 4}, "group_size=None"),
        ({"type": "fp8", "bits": 8}, "has neither bits nor group_size"),
        ({"type": "nf4", "bits": 4, "group_size": 64, "symmetric": False}, "has no zeros"),
    ],
)
def test_schemes_that_the_format_has_not_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        Scheme(**fields)


@pytest.mark.parametrize("scheme", [None, Scheme("int", 4, 16)])
def test_rows_may_keep_unlike_numbers_where_no_pattern_orders_them(scheme):
    """Half of a layer, as other programs prune: 0 to 48 of a row's 48 weights."""
    torch.manual_seed(0)
    pattern, weight, codes = Pattern.parse("unstructured:0.5"), torch.randn(6, 48), None
    keep = torch.zeros(6, 48, dtype=torch.bool)
    for row, count in enumerate((0, 48, 20, 28, 24, 24)):
        keep[row, torch.randperm(48)[:count]] = True
    weight = weight.masked_fill(~keep, 0)
    if scheme is not None:
        weight, codes = coded(scheme, keep, torch.float32)
    layer, parts = pack_layer("x", weight, keep, pattern, codes)
    assert same_bits(unpack_layer(layer, parts, torch.float32), weight)
    with pytest.raises(InputError, match=r"keeps 0 of the 48 .* but unstructured:0\.6 keeps 19"):
        pack_layer("x", weight, keep, Pattern.parse("unstructured:0.6"), codes)


def test_a_layer_of_nothing_but_zeros_is_packed():
    weight = torch.zeros(3, 8)
    layer, parts = pack_layer("x", weight, weight != 0, Pattern.parse("unstructured:0.5"))
    assert same_bits(unpack_layer(layer, parts, torch.float32), weight)


def test_a_layer_is_what_the_configuration_says():
    """config.json and back, and nothing in it that is not known."""
    layers = {
        "a": Layer((8, 16), Scheme(), TWO_FOUR),
        "b": Layer((8, 16), Scheme("int", 4, 8, False), TWO_FOUR),
    }
    value = json.loads(json.dumps(Contents(TWO_FOUR, layers).to_dict()))
    assert value["layers"] == {
        "a": {"scheme": "float", "shape": [8, 16]},
        "b": {"scheme": "int4-g8-asym", "shape": [8, 16]},
    }
    assert Contents.from_dict(value, "x") == Contents(TWO_FOUR, layers)
    for wrong in (
        {**value, "more": 1}, {**value, "layers": {"a": {"scheme": "other", "shape": [8, 16]}}},
        {**value, "layers": {"a": {"scheme": "float", "shape": [8, 15]}}}, {**value, "pattern": 24},
        {k: v for k, v in value.items() if k != "schemes"},
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"x: .*export the model again"):
            Contents.from_dict(wrong, "x")
