"""Packed 2:4 linear layers against float64 products of the weight that the packed tensors say."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.errors import InputError
from sparsify.kernels.cpu.layout import KINDS, WITH_GROUPS, Prepared, prepare
from sparsify.kernels.cpu.linear import available_paths, packed_linear
from sparsify.packed.layer import NF4

PATHS = ("torch", "plain", "avx2", "avx512")
BATCHES = (*range(1, 18), 33)
# Of sum |w x|: rounding of each product and sum of up to 4096 columns; measured 2.9e-7 at most.
SHARE = 1e-6


def dense_weight(
    kind: str,
    num_columns: int,
    group_size: int,
    weight_OK: Tensor,
    indices: Tensor,
    scales_OG: Tensor | None = None,
    zeros_OG: Tensor | None = None,
) -> Tensor:
    """The dense float32 (O, I) weight that a packed file's tensors stand for (see `prepare`).

    Exact but for nf4, whose product of value and scale is rounded to float32.
    """
    bits = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    index_OK = (indices.unsqueeze(2) >> bits & 3).flatten(1)[:, : num_columns // 2].long()
    column_OK = index_OK + torch.arange(num_columns // 2).div(2, rounding_mode="floor") * 4
    if kind in ("int4", "nf4"):
        nibbles = torch.stack((weight_OK & 0x0F, weight_OK >> 4), dim=2)
        codes_OK = nibbles.flatten(1)[:, : num_columns // 2]
        values_OK = torch.tensor(NF4)[codes_OK.long()] if kind == "nf4" else codes_OK.float()
        if kind == "int4" and zeros_OG is None:
            values_OK -= 8
    else:
        values_OK = weight_OK.float()
    if scales_OG is not None:
        group_OK = column_OK.div(group_size, rounding_mode="floor") if scales_OG.shape[1] > 1 else (
            torch.zeros_like(column_OK)
        )  # fmt: skip
        if zeros_OG is not None:
            values_OK = values_OK - zeros_OG.float().gather(1, group_OK)
        values_OK = values_OK * scales_OG.float().gather(1, group_OK)
    return values_OK.new_zeros(len(weight_OK), num_columns).scatter_(1, column_OK, values_OK)


class Layer(NamedTuple):
    """A random packed layer as a file holds it."""

    kind: str
    num_columns: int
    group_size: int
    weight: Tensor
    indices: Tensor
    scales: Tensor | None
    zeros: Tensor | None

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.weight, self.indices, self.scales, self.zeros

    @property
    def prepared(self) -> Prepared:
        return prepare(self.kind, self.num_columns, *self.stored)

    def dense(self) -> Tensor:
        return dense_weight(self.kind, self.num_columns, self.group_size, *self.stored)

    def __call__(self, inputs: Tensor, bias: Tensor | None = None, path: str = "auto") -> Tensor:
        return packed_linear(
            inputs, *self.prepared, bias, self.kind, len(self.weight), self.group_size, path
        )


def random_layer(
    kind: str, rows: int, columns: int, group_size: int, with_zeros: bool = False, seed: int = 0
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    kept = columns // 2
    pairs = torch.tensor(
        [first | second << 2 for first, second in itertools.combinations(range(4), 2)]
    )
    nibbles = pairs[numbers(0, 6, rows, columns // 4)].to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, columns // 4 % 2))
    indices = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    dtype = KINDS[kind]
    if dtype == torch.uint8:
        weight = numbers(0, 256, rows, -(-kept // 2)).to(torch.uint8)
        if kept % 2:
            weight[:, -1] &= 0x0F
    elif kind == "int8":
        weight = numbers(-128, 128, rows, kept).to(torch.int8)
    else:
        weight = torch.randn(rows, kept, generator=generator).to(dtype)
    groups = -(-columns // group_size)
    scales = zeros = None
    if kind in WITH_GROUPS:
        scales = torch.rand(rows, groups, generator=generator).half()
    if kind == "float8":
        scales = torch.rand(rows, 1, generator=generator)
    if with_zeros:
        zeros = numbers(0, 16, rows, groups).to(torch.uint8)
    return Layer(kind, columns, group_size, weight, indices, scales, zeros)


def assert_close(output: Tensor, inputs: Tensor, layer: Layer, bias: Tensor | None) -> None:
    """Within SHARE of the sum of magnitudes, and the output's own rounding."""
    weight, x = layer.dense().double(), inputs.double()
    expected, most = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        expected, most = expected + bias.double(), most + bias.double().abs()
    error = (output.double() - expected).abs()
    rounding = torch.finfo(output.dtype).eps / 2 if output.dtype != torch.float32 else 0.0
    assert (error <= SHARE * most + rounding * expected.abs() * 1.01).all(), (error / most).max()


def skip_unless_here(path: str) -> None:
    if path not in available_paths():
        pytest.skip(f"this machine has no path {path}")


def test_the_plain_path_is_here() -> None:
    """The compiler that the README asks for is enough for it, and all others but PyTorch's."""
    assert available_paths()[:2] == ("torch", "plain")


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_float64(path: str, data: st.DataObject) -> None:
    skip_unless_here(path)
    kind = data.draw(st.sampled_from(list(KINDS)))
    groups = data.draw(st.integers(1, 80))
    sizes = [size for size in (4, 12, 20, 32, 64, 96, 128) if size <= groups * 4] + [groups * 4]
    layer = random_layer(
        kind, data.draw(st.integers(1, 40)), groups * 4, data.draw(st.sampled_from(sizes)),
        kind in ("int4", "int8") and data.draw(st.booleans()), data.draw(st.integers(0, 99)),
    )  # fmt: skip
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    inputs = torch.randn(data.draw(st.sampled_from(BATCHES)), layer.num_columns).to(dtype)
    bias = torch.randn(len(layer.weight)) if data.draw(st.booleans()) else None
    output = layer(inputs, bias, path)
    assert output.dtype == dtype
    assert_close(output, inputs, layer, bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_batch(path: str, kind: str) -> None:
    """Each number of tokens takes code of its own; 4100 columns end within a chunk."""
    skip_unless_here(path)
    layer = random_layer(kind, 19, 4100, 128)
    for batch in BATCHES:
        inputs = torch.randn(batch, 4100)
        assert_close(layer(inputs, None, path), inputs, layer, None)


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("kind", list(KINDS))
def test_threads_change_no_bit(path: str, kind: str) -> None:
    skip_unless_here(path)
    layer = random_layer(kind, 45, 256, 64)
    before = torch.get_num_threads()
    try:
        for batch in (1, 3, 16, 33):
            inputs = torch.randn(batch, 256)
            outputs = []
            for threads in (1, 2, 3, 64):
                torch.set_num_threads(threads)
                outputs += [layer(inputs, None, path), layer(inputs, None, path)]
            assert all(torch.equal(outputs[0], other) for other in outputs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
def test_one_hot_inputs_read_the_weight(path: str) -> None:
    """Exactly: no product is rounded where one of two factors is 1."""
    skip_unless_here(path)
    for kind in ("float32", "bfloat16", "float16", "int8", "float8", "int4"):
        for with_zeros in (False, True) if kind in ("int8", "int4") else (False,):
            layer = random_layer(kind, 13, 132, 32, with_zeros)
            assert torch.equal(layer(torch.eye(132), None, path), layer.dense().T), kind


@pytest.mark.parametrize("path", PATHS)
def test_every_code(path: str) -> None:
    """All 254 numbers of float8, subnormal ones too, all 16 of nf4 and int4, all 256 of int8."""
    skip_unless_here(path)
    bits = torch.arange(256, dtype=torch.uint8)
    finite = bits[(bits & 0x7F) != 0x7F].view(torch.float8_e4m3fn).view(1, -1)
    for kind, weight in (
        ("float8", finite), ("int8", bits.view(torch.int8).view(1, -1)),
        ("nf4", bits.view(1, -1)), ("int4", bits.view(1, -1)),
    ):  # fmt: skip
        kept = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
        scales = torch.ones(1, 1, dtype=torch.float32 if kind == "float8" else torch.float16)
        # Half a byte where the number of groups is odd.
        first_two = torch.full((1, kept // 4 + kept // 2 % 2), 0x44, dtype=torch.uint8)
        layer = Layer(
            kind, 2 * kept, 2 * kept, weight, first_two, scales, None,
        )  # fmt: skip
        columns = torch.arange(kept) // 2 * 4 + torch.arange(kept) % 2
        read = layer(torch.eye(2 * kept)[columns], None, path).flatten()
        if weight.dtype == torch.uint8:
            codes = torch.stack((bits & 15, bits >> 4), dim=1).flatten()
            table = torch.tensor(NF4) if kind == "nf4" else torch.arange(-8.0, 8.0)
            assert torch.equal(read, table[codes.long()])
        else:
            assert torch.equal(read, weight.float().flatten())


@pytest.mark.parametrize("path", PATHS)
def test_inputs_of_any_strides(path: str) -> None:
    skip_unless_here(path)
    layer = random_layer("int4", 10, 64, 32)
    base = torch.randn(5, 3, 128)
    for inputs in (
        base[:, 1, :64],
        base[:, :, ::2],
        base[..., 64:],
        base.transpose(0, 1)[..., :64],
    ):
        output = layer(inputs, None, path)
        assert output.shape == (*inputs.shape[:-1], 10) and output.is_contiguous()
        assert torch.equal(output, layer(inputs.contiguous(), None, path))
    assert layer(torch.empty(0, 64), None, path).shape == (0, 10)
    assert layer(torch.randn(64), None, path).shape == (10,)


@pytest.mark.parametrize("path", PATHS[1:])
def test_pruned_weights_are_not_multiplied(path: str) -> None:
    skip_unless_here(path)
    layer = random_layer("bfloat16", 8, 64, 64)
    inputs = torch.randn(1, 64)
    inputs[0, 5] = float("inf")
    output = layer(inputs, None, path)
    assert torch.equal(output.isfinite()[0], layer.dense()[:, 5] == 0)


def test_scratch_memory_is_float32_whatever_the_default() -> None:
    """In half precision the buffer was half as large as what is written into it."""
    inputs = torch.randn(16, 65536, generator=torch.Generator().manual_seed(0))
    layer = random_layer("int4", 64, 65536, 128)
    expected = layer(inputs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(layer(inputs), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_op_is_sound() -> None:
    layer = random_layer("int4", 12, 64, 32, with_zeros=True)
    for inputs in (torch.randn(3, 64), torch.randn(2, 2, 64).bfloat16()):
        for bias in (None, torch.randn(12)):
            arguments = (inputs, *layer.prepared, bias, "int4", 12, 32, "auto")
            torch.library.opcheck(packed_linear, arguments)


def test_compiles_whole() -> None:
    layer = random_layer("bfloat16", 12, 64, 64)
    prepared = layer.prepared

    def twice(inputs: Tensor) -> Tensor:
        return packed_linear(inputs * 2, *prepared, None, "bfloat16", 12, 64) + 1

    inputs = torch.randn(3, 64)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), twice(inputs))
    torch._dynamo.mark_dynamic(inputs, 0)
    assert torch.equal(compiled(inputs), twice(inputs))


class TestRefusals:
    def test_a_path_that_is_not_here(self) -> None:
        layer = random_layer("int4", 8, 64, 32)
        with pytest.raises(InputError, match="path sse is not there; use one of: torch, plain"):
            layer(torch.randn(1, 64), None, "sse")

    def test_shapes_that_do_not_fit(self) -> None:
        layer = random_layer("int4", 8, 64, 32)
        with pytest.raises(InputError, match="inputs have 128 columns"):
            layer(torch.randn(1, 128))
        with pytest.raises(InputError, match="3 groups of scales"):
            packed_linear(
                torch.randn(1, 64), layer.prepared.blocks_BC, torch.ones(1, 3, 8).half(), None,
                None, "int4", 8, 32,
            )  # fmt: skip
        with pytest.raises(InputError, match="unknown kind int3"):
            packed_linear(torch.randn(1, 64), *layer.prepared, None, "int3", 8, 32)
