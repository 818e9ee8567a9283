"""Packed 2:4 linear layers of a GPU, without one: their numbers in Triton's interpreter, and what
the compiler makes of them for three generations of cards.

Triton decides at its import whether to interpret, so that those tests run in a process of their
own. The interpreter computes what the kernels say; it does not see which lane the hardware gives
what, nor races. Whether `mma.sp` takes positions as the manual has them is left to a GPU.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.benchmarks.support import linear_sides_cuda
from sparsify.errors import InputError
from sparsify.kernels.cuda import card, choice, decode, linear, ways
from sparsify.kernels.cuda.expand import expand
from sparsify.kernels.cuda.layout import KINDS, Prepared, prepare, restore
from sparsify.packed.layer import NF4, unpack_layer
from sparsify.packed.layout import Layer, Scheme
from sparsify.pattern import Pattern

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REPOSITORY = Path(__file__).resolve().parents[2]
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; the dev extra brings it"
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

# Of the sum of |w x|: float32 sums of exact products; and rounding of NF4's table to 16 bits.
SHARE = 4e-7
NF4_SHARE = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


class Packed:
    """A random packed layer as a file holds it."""

    def __init__(
        self, kind: str, rows: int, columns: int, size: int = 0, has_zeros: bool = False,
        seed: int = 0,
    ) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(seed)

        def numbers(high: int, *shape: int) -> Tensor:
            return torch.randint(0, high, shape, generator=random).to(torch.uint8)

        self.kind, self.rows, self.columns, self.size = kind, rows, columns, size
        kept = columns // 2
        pairs = torch.tensor([a | b << 2 for a, b in itertools.combinations(range(4), 2)])
        nibbles = pairs.to(torch.uint8)[numbers(6, rows, columns // 4).long()]
        nibbles = torch.nn.functional.pad(nibbles, (0, columns // 4 % 2))
        self.indices = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        bits = {"int4": 4, "nf4": 4, "int8": 8}.get(kind)
        if bits == 4:
            codes = torch.nn.functional.pad(numbers(16, rows, kept), (0, kept % 2))
            self.weight = codes[:, ::2] | codes[:, 1::2] << 4
        elif kind == "int8":
            self.weight = numbers(256, rows, kept).view(torch.uint8 if has_zeros else torch.int8)
        else:
            self.weight = torch.randn(rows, kept, generator=random).to(KINDS[kind])
        groups = -(-columns // size) if size else 1
        self.scales = self.zeros = None
        if bits:
            self.scales = torch.randn(rows, groups, generator=random).half()
        if kind == "float8":
            self.scales = torch.rand(rows, 1, generator=random)
        if has_zeros:
            self.zeros = numbers(16 if bits == 4 else 256, rows, groups)
        types = {"int4": "int", "int8": "int", "nf4": "nf4", "float8": "fp8"}
        scheme = Scheme(
            types.get(kind, "float"), bits, (size or columns) if bits else None,
            symmetric=not has_zeros,
        )  # fmt: skip
        self.layer = Layer((rows, columns), scheme, Pattern.parse("2:4"))

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.weight, self.indices, self.scales, self.zeros

    @property
    def prepared(self) -> Prepared:
        return prepare(self.kind, self.columns, self.size, *self.stored)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """By the reader of packed folders."""
        names = ("weight", "weight_indices", "weight_scales", "weight_zeros")
        parts = {n: t for n, t in zip(names, self.stored, strict=True) if t is not None}
        return unpack_layer(self.layer, parts, dtype)

    def check(self, output: Tensor, inputs: Tensor, bias: Tensor | None) -> None:
        """Within the shares of the sum of magnitudes, by float64."""
        weight, x = self.dense().double(), inputs.double()
        expected, most = x @ weight.T, x.abs() @ weight.abs().T
        if bias is not None:
            expected, most = expected + bias.double(), most + bias.double().abs()
        share = SHARE + (NF4_SHARE[inputs.dtype] if self.kind == "nf4" else 0.0)
        error = (output.double() - expected).abs()
        assert (error <= share * most).all(), float((error / most).max())


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


CASES = [(kind, zeros) for kind in KINDS for zeros in (False, True) if not zeros or "int" in kind]


class TestLayout:
    @settings(max_examples=60, deadline=None)
    @given(
        case=st.sampled_from(CASES), rows=st.integers(1, 40), groups=st.integers(1, 200),
        size=st.sampled_from([0, 32, 64, 128, 256, 512]), seed=st.integers(0, 9),
    )  # fmt: skip
    def test_comes_back_bit_for_bit(
        self, case: tuple[str, bool], rows: int, groups: int, size: int, seed: int
    ) -> None:
        kind, has_zeros = case
        if kind not in ("int8", "int4", "nf4"):
            size = 0
        packed = Packed(kind, rows, 4 * groups, size, has_zeros, seed)
        back = restore(kind, rows, 4 * groups, size, packed.prepared)
        for ours, theirs in zip(back, packed.stored, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                assert torch.equal(bits(ours), bits(theirs))

    def test_is_the_one_of_the_registers(self) -> None:
        """One survivor at a time, by the fragments of mma.sp in the PTX manual."""
        values = torch.arange(32 * 256, dtype=torch.int16).view(32, 256)
        packed = Packed("bfloat16", 32, 512)
        packed.weight = values.view(torch.bfloat16)
        prepared = packed.prepared
        words = prepared.values.view(torch.int16).view(2, 2, 8, 32, 4, 2)
        for lane, register, half in itertools.product(range(32), range(4), range(2)):
            row = lane // 4 + 8 * (register % 2)
            column = 2 * (lane % 4) + half + 8 * (register // 2)
            assert words[1, 1, 3, lane, register, half] == values[16 + row, 128 + 3 * 16 + column]
        for word, lane, i, down in itertools.product(range(4), range(32), range(4), range(2)):
            tile, half = 2 * word + lane % 4 // 2, lane % 2
            group = 64 + 8 * tile + 4 * half + i
            byte = int(packed.indices[16 + lane // 4 + 8 * down, group // 2])
            nibble = byte >> 4 * (group % 2) & 15
            found = int(prepared.positions[1, 1, lane, word]) >> (16 * down + 4 * i) & 15
            assert found == nibble

    @pytest.mark.parametrize(("kind", "size", "bits_a_weight"), [
        ("bfloat16", 0, 9), ("int8", 128, 5.125), ("float8", 0, 5), ("int4", 128, 3.125),
        ("int4", 32, 3.5), ("nf4", 64, 3.25),
    ])  # fmt: skip
    def test_has_no_more_bytes_than_the_file(
        self, kind: str, size: int, bits_a_weight: float
    ) -> None:
        packed = Packed(kind, 64, 512, size)
        num_bytes = sum(t.nbytes for t in packed.prepared if t is not None)
        assert num_bytes == sum(t.nbytes for t in packed.stored if t is not None)
        per_row = 4 * 64 if kind == "float8" else 0
        assert num_bytes - per_row == 64 * 512 * bits_a_weight / 8

    def test_what_the_kernels_cannot_take_is_refused(self) -> None:
        packed = Packed("int4", 16, 512, 96)
        with pytest.raises(InputError, match=r"groups of 96 columns on a GPU; use 32, 64, 128"):
            _ = packed.prepared
        packed = Packed("float8", 16, 512)
        packed.weight.view(torch.uint8)[3, 5] = 0x7F
        with pytest.raises(InputError, match="float8 weight is NaN"):
            _ = packed.prepared
        packed = Packed("bfloat16", 16, 512)
        packed.indices[2, 3] = 0x45  # positions 1 and 1
        with pytest.raises(InputError, match=r"positions that no 2:4 mask has"):
            _ = packed.prepared
        packed = Packed("int4", 16, 512, 128, has_zeros=True)
        packed.zeros.fill_(128)  # type: ignore[union-attr]
        with pytest.raises(InputError, match="takes no such zeros"):
            _ = packed.prepared


@needs_triton
def test_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__,
         "-k", "TestInterpreted"],
        cwd=REPOSITORY, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and f"{NUM_INTERPRETED} passed" in done.stdout, done.stdout


DECODE = [
    # kind, rows, columns, group size, zeros, tokens, inputs
    ("bfloat16", 40, 600, 0, False, 1, "bfloat16"),
    ("float16", 16, 256, 0, False, 16, "float16"),
    ("int8", 16, 512, 0, False, 5, "bfloat16"),
    ("int8", 20, 300, 128, True, 2, "float16"),
    ("int8", 16, 256, 64, True, 3, "bfloat16"),
    ("float8", 17, 516, 0, False, 9, "bfloat16"),
    ("float8", 16, 256, 0, False, 1, "float16"),
    ("int4", 32, 512, 128, False, 1, "bfloat16"),
    ("int4", 16, 768, 32, False, 4, "float16"),
    ("int4", 33, 300, 64, True, 8, "bfloat16"),
    ("int4", 16, 768, 0, False, 2, "bfloat16"),
    ("int4", 16, 512, 0, True, 1, "bfloat16"),
    ("int4", 16, 768, 512, False, 13, "bfloat16"),
    ("nf4", 16, 512, 64, False, 1, "bfloat16"),
    ("nf4", 16, 768, 0, False, 3, "float16"),
]
EXPAND = [
    ("bfloat16", 40, 300, 0, False), ("float16", 16, 256, 0, False), ("int8", 24, 256, 0, False),
    ("int8", 16, 300, 128, True), ("float8", 40, 256, 0, False), ("int4", 33, 516, 32, False),
    ("int4", 16, 256, 0, True), ("nf4", 16, 300, 64, False),
]  # fmt: skip
NUM_INTERPRETED = len(DECODE) + len(EXPAND) + 13


@interpreted
class TestInterpreted:
    @pytest.fixture(autouse=True)
    def _assembly(self) -> None:
        from tests.ptx import install

        install()

    @pytest.mark.parametrize(
        ("kind", "rows", "columns", "size", "zeros", "tokens", "dtype"), DECODE
    )
    def test_few_tokens(
        self, kind: str, rows: int, columns: int, size: int, zeros: bool, tokens: int, dtype: str
    ) -> None:
        packed = Packed(kind, rows, columns, size, zeros)
        inputs = torch.randn(tokens, columns).to(FLOATS[dtype])
        bias = torch.randn(rows) if rows % 2 else None
        output = decode.decode(
            inputs, packed.prepared, bias, kind, rows, size, out_dtype=torch.float32
        )
        packed.check(output, inputs, bias)

    def test_integers_and_float8_are_exact(self) -> None:
        """Sums of a few weights, exact in float32 in any order, have the bits of float64's."""
        for kind, count in (("float8", 256), ("int8", 256), ("int4", 16)):
            packed = Packed(kind, 16, 256, 0)
            codes = torch.arange(16 * 128).remainder(count).to(torch.uint8).view(16, 128)
            codes[codes.bitwise_and(0x7F) == 0x7F] = 0 if kind == "float8" else 0x7F
            if kind == "int4":
                codes = codes[:, ::2] | codes[:, 1::2] << 4
            packed.weight = codes.view(packed.weight.dtype)
            packed.scales = torch.ones_like(packed.scales)  # type: ignore[arg-type]
            inputs = (torch.rand(2, 256) < 0.1).bfloat16()
            output = decode.decode(inputs, packed.prepared, None, kind, 16, 0, torch.float32)
            assert torch.equal(output.double(), inputs.double() @ packed.dense().double().T)

    @pytest.mark.parametrize(
        "plan", [(1, 2, 2, 1, 2, False), (2, 1, 1, 4, 1, True), (1, 1, 2, 2, 4, True)]
    )
    @pytest.mark.parametrize("case", [("int4", 128, 768), ("float8", 0, 300)], ids=str)
    def test_row_tiles_and_warps(
        self, plan: Any, case: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Several row tiles and warps; warps that do not divide the steps; inputs arranged."""
        monkeypatch.setattr(decode, "plan_of", lambda *_: decode.Plan(*plan))
        kind, size, columns = case
        packed = Packed(kind, 64, columns, size)
        inputs, bias = torch.randn(3, columns).bfloat16(), torch.randn(64)
        output = decode.decode(inputs, packed.prepared, bias, kind, 64, size, torch.float32)
        packed.check(output, inputs, bias)

    @pytest.mark.parametrize(("kind", "rows", "columns", "size", "zeros"), EXPAND)
    def test_dense_rows_have_the_bits_of_the_reader(
        self, kind: str, rows: int, columns: int, size: int, zeros: bool
    ) -> None:
        packed = Packed(kind, rows, columns, size, zeros)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            first = 16 if rows > 16 else 0
            some = expand(packed.prepared, kind, columns, size, slice(first, rows), dtype)
            assert torch.equal(bits(some), bits(packed.dense(dtype)[first:]))

    def test_one_launch_a_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launches: list[Any] = []
        kernel = decode.decode_kernel

        class Counted:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
                launches.append(grid)
                launch: Callable[..., object] = kernel[grid]
                return launch

        monkeypatch.setattr(decode, "decode_kernel", Counted())
        packed = Packed("int4", 40, 256, 128)
        inputs = torch.randn(2, 8, 256).bfloat16()
        output = linear.linear(inputs, packed.prepared, torch.ones(40), [], "", "int4", 40, 128)
        assert output.shape == (2, 8, 40) and launches == [(3,)]

    def test_many_tokens_go_the_way_that_was_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ways, "_SCRATCH_BYTES", 1)  # 16 rows at a time
        packed = Packed("int4", 40, 256, 128)
        problem = ways.Problem("int4", 40, 256, 128, False, "bfloat16")
        inputs, bias = torch.randn(33, 256).bfloat16(), torch.randn(40).bfloat16()
        expected = inputs.double() @ packed.dense().double().T + bias.double()
        times = {number: {"decode": 3.0, "expand": 2.0, "dense": 1.0} for number in choice.TOKENS}
        for may_copy, name in ((False, "expand"), (True, "dense")):
            choices = choice.Choices(None, "card", {}, may_copy)
            found = choices.get(problem, lambda: times)
            assert found.way(33) == name
            monkeypatch.setattr(choice._Used, "choices", choices)
            make = ways.WAYS[name].copy
            copies = [] if make is None else make(problem, packed.prepared)
            output = linear.linear(
                inputs, packed.prepared, bias, copies, found.copy or "", "int4", 40, 128
            )
            assert ((output.double() - expected).norm() / expected.norm()) < 1e-2
        # A layer of this shape without the copy is not given a way that needs one.
        output = linear.linear(inputs, packed.prepared, bias, [], "", "int4", 40, 128)
        assert ((output.double() - expected).norm() / expected.norm()) < 1e-2

    def test_a_layer_that_comes_into_the_kernels_order_is_measured_once_on_its_card(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        calls: list[None] = []

        def seconds(call: Callable[[], object]) -> float:
            call()
            calls.append(None)
            return 1 / len(calls)  # what is measured later is faster: the dense way

        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        few = partial(choice.measure_ways, tokens=(32, 64))
        monkeypatch.setattr(card, "measure_ways", few)
        monkeypatch.setattr(card, "cold_s", seconds)
        monkeypatch.setattr(card, "cache_folder", lambda: tmp_path)
        monkeypatch.setattr(choice._Used, "choices", choice.Choices(None, "", {}))
        packed = Packed("int4", 40, 256, 128)
        problem = ways.Problem("int4", 40, 256, 128, False, "bfloat16")
        assert card.chosen_copy(problem, packed.prepared) == ("", [])
        num_calls = len(calls)
        assert num_calls == 3 * 2  # decode, expand and dense, at 2 numbers of tokens
        name, copies = card.chosen_copy(problem, packed.prepared, card.use_card(may_copy=True))
        assert name == "dense" and torch.equal(copies[0], packed.dense().bfloat16())
        assert len(calls) == num_calls and choice.used().way(problem, 100) == "dense"
        assert card.shown().startswith(f"card (torch {torch.__version__}, triton ")

        def full(call: Callable[[], object]) -> float:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(card, "cold_s", full)
        other = ways.Problem("int4", 40, 256, 128, False, "float16")
        with pytest.warns(RuntimeWarning, match="float16: no room to measure its ways; up to 64"):
            assert card.chosen_copy(other, packed.prepared) == ("", [])
        assert choice.used().way(other, 100) == "expand"

    def test_the_check_that_a_benchmark_makes_on_a_gpu(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            linear_sides_cuda, "packed_linear",
            lambda x, v, p, s, z, *rest: linear.linear(x, Prepared(v, p, s, z), *rest),
        )  # fmt: skip
        case = linear_sides_cuda.Case("float8", 0, False, 24, 300, (1, 3))
        found = linear_sides_cuda.errors_of(case, "cpu")
        assert [row["tokens"] for row in found] == [1, 3]
        # The interpreter cuts float32 off to bfloat16 where a card rounds: up to 2**-7, not 2**-8.
        assert all(0 < row["error"] < 2.0**-7 for row in found)

    def test_the_op_is_kept_whole_by_the_compiler(self) -> None:
        op = linear.packed_linear
        op.register_kernel("cpu")(
            lambda x, v, p, s, z, *rest: linear.linear(x, Prepared(v, p, s, z), *rest)
        )
        packed = Packed("bfloat16", 16, 256)
        inputs = torch.randn(2, 256).bfloat16()
        given = (*packed.prepared, None, [], "", "bfloat16", 16, 0)
        torch.library.opcheck(op, (inputs, *given), test_utils=("test_schema", "test_faketensor"))
        step = torch.compile(
            lambda x: torch.relu(op(x, *given)) + 1, fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(step(inputs), torch.relu(op(inputs, *given)) + 1)

    def test_a_layer_of_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a GPU: its order at the first product, the files' order for whoever saves."""
        from sparsify.integrations.linear import PackedLinear
        from sparsify.kernels import orders

        monkeypatch.setitem(orders.ORDERS, "cpu", orders.ORDERS["cuda"])
        monkeypatch.setattr(
            linear, "packed_linear",
            lambda x, v, p, s, z, *rest: linear.linear(x, Prepared(v, p, s, z), *rest),
        )  # fmt: skip
        packed = Packed("int4", 24, 256, 128)
        module = PackedLinear(packed.layer, torch.bfloat16, has_bias=False)
        state = {"weight": packed.weight, "weight_indices": packed.indices,
                 "weight_scales": packed.scales}  # fmt: skip
        module.load_state_dict(state)
        inputs = torch.randn(3, 256).bfloat16()
        output = module(inputs)
        assert (module.order, module.kind) == ("cpu", "int4") and module.weight.ndim == 5
        expected = inputs.double() @ packed.dense().double().T
        assert ((output.double() - expected).norm() / expected.norm()) < 1e-2
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name])  # type: ignore[arg-type]
        assert module.order is None


@needs_triton
class TestCompiled:
    """For cards that are not here: sm_80, sm_90 and sm_120."""

    # kind, columns of a scale, zeros; 16-byte loads of a step; instructions a survivor, registers
    FORMS = (
        ("bfloat16", 0, False, 9, 1.3, 80), ("int8", 0, False, 5, 3.4, 80),
        ("float8", 0, False, 5, 4.0, 80), ("int4", 128, False, 3, 3.3, 80),
        ("int4", 64, True, 3, 3.6, 80), ("nf4", 64, False, 3, 6.0, 80),
    )  # fmt: skip

    @pytest.mark.parametrize("arch", [80, 90, 120])
    @pytest.mark.parametrize("form", FORMS, ids=[f"{f[0]}-{f[1]}-{f[2]}" for f in FORMS])
    def test_decode(
        self, form: tuple[Any, ...], arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kind, width, zeros, num_loads, most_instructions, most_registers = form
        if (arch != 90 and kind in ("int8", "nf4")) or (zeros and arch == 120):
            pytest.skip("compiled for sm_90, and its instructions for the others with other kinds")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        made = compiled(arch, KIND=kind, WIDTH=width, HAS_ZEROS=zeros)
        wide = re.findall(r"ld\.global[.\w:]*\.v4\.b32", made.asm["ptx"])
        assert len(wide) == num_loads
        assert "mma.sp::ordered_metadata.sync.aligned.m16n8k32" in made.asm["ptx"]
        text, registers, stack, local = disassembled(made)
        assert (stack, local) == (0, 0) and registers <= most_registers
        assert not re.search(r"\b(LDL|STL)\b", text)
        body = loop(text)
        products = [i for i, line in enumerate(body) if "HMMA.SP" in line]
        loads = [i for i, line in enumerate(body) if "LDG.E" in line and ".128" in line]
        assert len(products) == 8 and len(loads) == num_loads
        assert max(loads) < min(products), "loads sank to their uses: too few are in flight"
        assert len(body) / 64 <= most_instructions
        assert not re.search(r"\b(LDS|STS|SHFL|STSM)\b", "\n".join(body)), "values change lanes"
        used = set(
            re.findall(r"elementwise_inline_asm.*tensor<128x\w+, (#\w+)>", made.asm["ttgir"])
        )
        layouts = dict(re.findall(r"^(#\w+) = #ttg\.(.*)$", made.asm["ttgir"], re.MULTILINE))
        assert {layouts[name] for name in used} == {
            "blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]}>"
        }

    @pytest.mark.parametrize("wide", [{"N": 2, "R": 2}, {"N": 8}])
    def test_more_tokens_and_rows_without_spills(
        self, wide: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        made = compiled(90, KIND="int4", WIDTH=128, CUTS_COLUMNS=True, CUTS_STEPS=True, **wide)
        _, registers, stack, local = disassembled(made)
        assert (stack, local) == (0, 0) and registers <= 255

    @pytest.mark.parametrize("arch", [80, 90, 120])
    def test_expand(self, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        from sparsify.kernels.cuda.expand import expand_kernel

        constants = {"KIND": "int4", "WIDTH": 128, "HAS_ROW_SCALES": False, "HAS_ZEROS": False,
                     "TABLE": NF4}  # fmt: skip
        pointers = {"values_ptr": "*i32", "positions_ptr": "*i32", "scales_ptr": "*i32",
                    "zeros_ptr": "*i16", "dense_ptr": "*bf16"}  # fmt: skip
        made = compile_for(
            arch, expand_kernel, pointers, ("first", "num_rows", "num_columns"), constants, 4
        )
        _, _, stack, local = disassembled(made)
        assert (stack, local) == (0, 0)
        assert re.search(r"st\.global[.\w:]*\.v2\.b32|st\.global[.\w:]*\.b64", made.asm["ptx"])


def compiled(arch: int, **given: Any) -> Any:
    """The decode kernel for a card, down to machine code."""
    from sparsify.kernels.cuda._decode_triton import decode_kernel
    from sparsify.kernels.cuda.ptx import sparse_product_ptx

    width = given["WIDTH"]
    constants = {
        "IS_HALF": False, "HAS_ROW_SCALES": not width and given["KIND"] != "bfloat16",
        "HAS_ZEROS": False, "HAS_BIAS": True, "CUTS_COLUMNS": False, "CUTS_STEPS": False, "N": 1,
        "R": 1, "ROW_WARPS": 1, "STEP_WARPS": 4, "U": 1, "IS_ARRANGED": False,
        "OVERLAPS": arch >= 90,
        "FIRST": sparse_product_ptx(0, False),
        "SECOND": sparse_product_ptx(1, False), **given,
    }  # fmt: skip
    pointers = {"inputs_ptr": "*i32", "values_ptr": "*i32", "positions_ptr": "*i32",
                "scales_ptr": "*i32" if width else "*fp32", "zeros_ptr": "*i16",
                "bias_ptr": "*bf16", "output_ptr": "*bf16"}  # fmt: skip
    sizes = ("num_tokens", "num_rows", "num_columns", "num_steps")
    num_warps = constants["ROW_WARPS"] * constants["STEP_WARPS"]
    return compile_for(arch, decode_kernel, pointers, sizes, constants, num_warps)


def compile_for(
    arch: int, function: Any, pointers: dict[str, str], sizes: tuple[str, ...],
    constants: dict[str, Any], num_warps: int,
) -> Any:  # fmt: skip
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = {**pointers, **dict.fromkeys(sizes, "i32"), **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=function, signature=signature, constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in range(len(pointers))},
    )  # fmt: skip
    return compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})


def disassembled(made: Any) -> tuple[str, int, int, int]:
    """Machine code as text; registers, bytes of stack and of local memory of a thread."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run(
                [tools / tool, *options, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, options in (("nvdisasm", ["-c"]), ("cuobjdump", ["-res-usage"]))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found
    registers, stack, local = map(int, found.groups())
    return text, registers, stack, local


def loop(text: str) -> list[str]:
    """Instructions of the loop over steps: between a label and the last branch back to it."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L_\w+):", line.strip()):
            labels[label[1]] = len(lines)
        if instruction := re.match(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
            back = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1])
            if back and back[1] in labels and len(lines) - labels[back[1]] > max(10, len(found)):
                found = lines[labels[back[1]] :]
    assert found, "the kernel has no loop"
    return found


@needs_gpu
class TestOnGpu:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
    @pytest.mark.parametrize("tokens", [1, 2, 8, 13, 16, 64, 200])
    def test_equals_float64(self, case: tuple[str, bool], tokens: int) -> None:
        kind, has_zeros = case
        size = 128 if kind in ("int8", "int4", "nf4") else 0
        packed = Packed(kind, 200, 1100, size, has_zeros)
        dtype = torch.float16 if kind == "float16" else torch.bfloat16
        inputs, bias = torch.randn(tokens, 1100).to(dtype), torch.randn(200).to(dtype)
        prepared = Prepared(*(None if t is None else t.cuda() for t in packed.prepared))  # type: ignore[arg-type]
        output = linear.packed_linear(
            inputs.cuda(), *prepared, bias.cuda(), [], "", kind, 200, size
        ).cpu()
        expected = inputs.double() @ packed.dense().double().T + bias.double()
        assert ((output.double() - expected).norm() / expected.norm()) < 5e-3
        if tokens <= 64:
            exact = decode.decode(
                inputs.cuda(), prepared, bias.cuda(), kind, 200, size, torch.float32
            )
            packed.check(exact.cpu(), inputs, bias)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
    def test_dense_rows_have_the_bits_of_the_reader(self, case: tuple[str, bool]) -> None:
        kind, has_zeros = case
        size = 64 if kind in ("int8", "int4", "nf4") else 0
        packed = Packed(kind, 200, 1100, size, has_zeros)
        prepared = Prepared(*(None if t is None else t.cuda() for t in packed.prepared))  # type: ignore[arg-type]
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            some = expand(prepared, kind, 1100, size, slice(16, 200), dtype).cpu()
            assert torch.equal(bits(some), bits(packed.dense(dtype)[16:]))
