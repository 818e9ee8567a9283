"""The kernels against float64 oracles, written out one number at a time.

Triton kernels run in Triton's interpreter, in a process of their own, because Triton decides at
its import whether to interpret. They are also compiled for a GPU, which needs none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.kernels import gram, sweep, triton_jit
from sparsify.kernels.precision import float32_products, half_product
from sparsify.pattern import Pattern

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATTERNS = ["2:4", "1:4", "4:8", "1:2", "unstructured:0.5"]
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; the dev extra brings it"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
Problem = tuple[Tensor, Tensor, Tensor]


def problem(num_rows: int, num_columns: int, seed: int = 0) -> Problem:
    """float64 weight, U of a strongly correlated Hessian, and an allowed mask."""
    generator = torch.Generator().manual_seed(seed)
    weight, mix, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((num_rows, num_columns), (num_columns, num_columns), (4 * num_columns,) * 2)
    )
    inputs = noise[:, :num_columns] @ (mix / num_columns**0.5 + torch.eye(num_columns))
    upper = torch.linalg.cholesky(torch.linalg.inv(inputs.T @ inputs / len(inputs)), upper=True)
    return weight, upper, torch.rand(weight.shape, generator=generator) < 0.6


def oracle(
    weight: Tensor, upper: Tensor, pattern: Pattern, block_size: int,
    allowed: Tensor | None, is_fixed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """SparseGPT's Algorithm 1, one row, one column and one later column at a time."""
    num_columns = weight.shape[1]
    result, keep = weight.clone(), torch.zeros(weight.shape, dtype=torch.bool)
    width = pattern.m or block_size
    for w, kept, may in zip(
        result, keep, torch.ones_like(keep) if allowed is None else allowed, strict=True
    ):
        for column in range(num_columns):
            if is_fixed:
                kept[column] = may[column]
            elif column % width == 0:
                chosen = [k for k in range(column, min(column + width, num_columns)) if may[k]]
                stop = min(column + width, num_columns)
                quota = pattern.num_kept(stop) - pattern.num_kept(column)
                kept[sorted(chosen, key=lambda k: (-float(abs(w[k] / upper[k, k])), k))[:quota]] = 1
            if not kept[column]:
                error = float(w[column] / upper[column, column])
                for later in range(column, num_columns):
                    w[later] -= error * upper[column, later]
                w[column] = 0.0
    return result, keep


def masks_for(allowed: Tensor) -> list[tuple[Tensor | None, bool]]:
    return [(None, False), (allowed, False), (allowed, True)]


class TestSweep:
    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("case", [0, 1, 2], ids=["free", "allowed", "fixed"])
    def test_equals_the_oracle(self, text: str, case: int) -> None:
        pattern = Pattern.parse(text)
        weight, upper, allowed = problem(5, 40)
        before = weight.clone()
        mask, is_fixed = masks_for(allowed)[case]
        expected, keep = oracle(weight, upper, pattern, 16, mask, is_fixed)
        pruned, kept = sweep.sweep(weight, upper, pattern, 16, mask, is_fixed)
        assert torch.equal(kept, keep)
        # float64 on both sides, in other orders; measured 1.3e-15 on weights of up to 4.2.
        torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-12)
        assert torch.equal(weight, before) and pruned.is_contiguous() and kept.is_contiguous()
        assert not pruned[~kept].any()

    @pytest.mark.parametrize("text", PATTERNS)
    def test_a_row_alone_gets_the_same_mask(self, text: str) -> None:
        weight, upper, _ = problem(17, 64)
        pattern = Pattern.parse(text)
        whole, keep = sweep.sweep(weight.float(), upper.float(), pattern, 32)
        for rows in (slice(3, 4), slice(0, 9), slice(9, 9)):
            part, kept = sweep.sweep(weight[rows].float(), upper.float(), pattern, 32)
            assert torch.equal(kept, keep[rows])
            # Products of other shapes round differently; measured 1.7e-6 on weights of up to 4.3.
            torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
    def test_of_equal_scores_the_left_one_survives(self, text: str) -> None:
        pattern = Pattern.parse(text)
        weight = torch.ones(3, 16)
        weight[1, 4:] = 0.0  # ties at zero too
        weight[2, ::2] = -1.0
        _, keep = sweep.sweep(weight, torch.eye(16), pattern, 8)
        first = torch.arange(16) % pattern.m < pattern.n
        assert torch.equal(keep, first.expand(3, 16))

    def test_ties_in_one_row_leave_the_others_alone(self) -> None:
        weight, upper, _ = problem(6, 32)
        pattern = Pattern.parse("2:4")
        expected, keep = sweep.sweep(weight, upper, pattern, 16)
        weight = torch.cat((weight, torch.zeros(1, 32, dtype=weight.dtype)))
        pruned, kept = sweep.sweep(weight, upper, pattern, 16)
        assert torch.equal(kept[:6], keep)
        torch.testing.assert_close(pruned[:6], expected, rtol=0, atol=1e-12)
        assert not pruned[6].any() and torch.equal(kept[6], torch.arange(32) % 4 < 2)


class TestGram:
    @pytest.mark.parametrize("num_columns", [1, 31, 32, 33, 250, 300])
    def test_upper_triangle_is_that_of_the_product(self, num_columns: int) -> None:
        generator = torch.Generator().manual_seed(num_columns)
        inputs = torch.randn(64, num_columns, generator=generator)
        total = torch.zeros(num_columns, num_columns)
        gram.add_gram_(total, inputs[:20])
        gram.add_gram_(total, inputs[20:].bfloat16().float())
        parts = inputs[:20].double(), inputs[20:].bfloat16().double()
        expected = sum((part.T @ part for part in parts), torch.zeros((), dtype=torch.float64))
        found = gram.mirror_upper_(total)
        assert torch.equal(found, found.T)
        # 64 products of numbers up to 4 in float32; measured 1.2e-5.
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("size", [1, 5, 512, 513, 1100])
    def test_mirror_takes_the_upper_triangle(self, size: int) -> None:
        matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        expected = torch.where(torch.ones(size, size).triu().bool(), matrix, matrix.T)
        assert torch.equal(gram.mirror_upper_(matrix), expected)

    def test_cross_is_left_transposed_times_right(self) -> None:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(50, n, generator=generator).bfloat16() for n in (7, 11))
        total = torch.ones(7, 11)
        gram.add_cross_(total, left, right)
        expected = 1 + left.double().T @ right.double()
        torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-4)


@pytest.fixture
def precision_put_back() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("precision_put_back")
@pytest.mark.parametrize("interface", ["none", "older", "by name", "newer"])
def test_precision_is_set_inside_and_put_back(interface: str) -> None:
    cuda = torch.backends.cuda.matmul
    if interface == "older":
        cuda.allow_tf32 = True
    elif interface == "by name":
        torch.set_float32_matmul_precision("high")
    elif interface == "newer":
        cuda.fp32_precision = "tf32"
    before = cuda.fp32_precision
    for allowed, expected in ((False, "ieee"), (True, "tf32")):
        with contextlib.suppress(KeyError), float32_products(allowed):
            assert cuda.fp32_precision == expected
            raise KeyError  # what is set is put back after an error too
        assert cuda.fp32_precision == before
    if interface in ("older", "by name"):
        assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("scale", [1e-34, 1.0, 1e34])
def test_half_product_is_within_its_rounding(scale: float) -> None:
    """Two numbers of 11 bits: at most 2^-10 of |left| |right|, row by row, of any size."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(16, 96, generator=generator) * torch.logspace(-2, 2, 16).unsqueeze(1) * scale
    left[3] = 0.0
    left[5, 1:] *= 1e-9  # far below the row's largest
    right = torch.corrcoef(torch.randn(96, 300, generator=generator))
    product = half_product(left, right.half())
    exact = left.double() @ right.double()
    bound = (left.double().abs() @ right.double().abs()) * 2**-10
    assert product.dtype == torch.float32
    assert ((product.double() - exact).abs() <= bound).all()
    assert (product[3] == 0).all()
    assert (product.double() - exact).abs().max() > 0, "not full precision"


def test_without_triton_a_kernel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_jit, "triton", None)
    with pytest.raises(InputError, match="need Triton, which is not installed; install the CUDA"):
        triton_jit.require_triton()


if INTERPRETED:

    class TestInterpreted:
        """Run by tests/integration/test_processes.py."""

        @pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
        @pytest.mark.parametrize("case", [0, 1, 2], ids=["free", "allowed", "fixed"])
        def test_sweep_equals_the_oracle(self, text: str, case: int) -> None:
            from sparsify.kernels import _sweep_triton

            pattern = Pattern.parse(text)
            # Two programs with rows left over, three blocks of which the last is cut short.
            weight, upper, allowed = problem(18, 40)
            mask, is_fixed = masks_for(allowed)[case]
            expected, keep = oracle(weight, upper, pattern, 16, mask, is_fixed)
            given = weight.float()
            pruned, kept = _sweep_triton.sweep(
                given, upper.float(), pattern.n, pattern.m, 16, mask, is_fixed
            )
            assert torch.equal(kept, keep) and torch.equal(given, weight.float())
            # float32; measured 2.4e-6 on weights of up to 7.
            torch.testing.assert_close(pruned.double(), expected, rtol=0, atol=2e-5)
            assert not pruned[~kept].any()

        @pytest.mark.parametrize("is_masked", [False, True])
        def test_sweep_of_a_stack_is_that_of_each(self, is_masked: bool) -> None:
            from sparsify.kernels import _sweep_triton

            parts = [problem(18, 40, seed) for seed in range(3)]
            weight, upper = (torch.stack([part[at].float() for part in parts]) for at in (0, 1))
            allowed = torch.stack([part[2] for part in parts]) if is_masked else None
            pruned, kept = _sweep_triton.sweep(weight, upper, 2, 4, 16, allowed, False)
            for at in range(3):
                mask = None if allowed is None else allowed[at]
                alone = _sweep_triton.sweep(weight[at], upper[at], 2, 4, 16, mask, False)
                assert torch.equal(pruned[at], alone[0]) and torch.equal(kept[at], alone[1])

        def test_sweep_keeps_the_left_one_of_equals(self) -> None:
            from sparsify.kernels import _sweep_triton

            weight = torch.ones(2, 16)
            weight[1, 4:] = 0.0
            _, keep = _sweep_triton.sweep(weight, torch.eye(16), 2, 4, 16, None, False)
            assert torch.equal(keep, (torch.arange(16) % 4 < 2).expand(2, 16))

        def test_gram_adds_the_upper_tiles(self) -> None:
            """float16 alone: Triton 3.7.1 interprets products of bfloat16 as those of integers."""
            from sparsify.kernels import _gram_triton

            inputs = torch.randn(70, 40, generator=torch.Generator().manual_seed(0)).half()
            total = torch.ones(40, 40)
            _gram_triton.add_upper_(total, inputs, tile=16, step=32)
            expected = 1 + inputs.double().T @ inputs.double()
            above = torch.ones(40, 40).triu().bool()
            torch.testing.assert_close(total[above].double(), expected[above], rtol=0, atol=1e-4)
            assert (total[16:, :16] == 1).all() and (total[32:, :32] == 1).all()

        def test_gram_has_the_same_bits_in_any_order_of_tiles(self, monkeypatch: Any) -> None:
            """Ten rows of tiles: a whole group of eight, and one that is cut short."""
            from sparsify.kernels import _gram_triton

            inputs = torch.randn(40, 150, generator=torch.Generator().manual_seed(0)).half()
            totals = torch.ones(2, 150, 150)
            for group, total in zip((8, 1), totals, strict=True):
                monkeypatch.setattr(_gram_triton, "_GROUP", group)
                _gram_triton.add_upper_(total, inputs, tile=16, step=32)
            assert torch.equal(totals[0], totals[1])


@pytest.mark.parametrize("num_tiles", [1, 7, 8, 9, 112])
def test_neighbouring_tiles_of_the_gram_are_computed_at_one_time(num_tiles: int) -> None:
    """What the 132 programs of a wave read of the inputs, in tiles; 112 is 14,336 columns."""
    from sparsify.kernels import _gram_triton

    tile_of = getattr(_gram_triton._tile_of, "fn", _gram_triton._tile_of)

    def read(group: int) -> int:
        tiles = [tile_of(program, num_tiles, group) for program in range(num_tiles**2)]
        assert len(set(tiles)) == num_tiles**2
        assert {tile for pair in tiles for tile in pair} == set(range(num_tiles))
        upper = [tile for tile in tiles if tile[0] <= tile[1]]
        waves = [upper[at : at + 132] for at in range(0, len(upper), 132)]
        return sum(len({tile for pair in wave for tile in pair}) for wave in waves)

    assert read(_gram_triton._GROUP) <= read(1)
    if num_tiles == 112:
        assert read(_gram_triton._GROUP) < read(1) / 3  # 1,209 where rows of tiles take 3,649


@needs_triton
@pytest.mark.parametrize("kernel", ["sweep", "gram"])
def test_kernels_compile_for_a_gpu(
    kernel: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code of compute capability 9.0; the gram must use tensor cores."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sparsify.kernels import _gram_triton, _sweep_triton

    if kernel == "sweep":
        function = _sweep_triton._sweep_block_kernel
        constants = {"WIDTH": 128, "N": 2, "M": 4, "HAS_ALLOWED": True, "IS_FIXED": False,
                     "R": 16, "B": 128}  # fmt: skip
        pointers = {"work_ptr": "*fp32", "error_ptr": "*fp32", "keep_ptr": "*i1",
                    "allowed_ptr": "*i1", "upper_ptr": "*fp32", "inverse_ptr": "*fp32"}  # fmt: skip
        sizes = ["num_rows", "num_columns", "start", "error_stride"]
    else:
        function = _gram_triton._gram_kernel
        constants = {"TILE": 128, "STEP": 64, "GROUP": 8}
        pointers = {"inputs_ptr": "*bf16", "sum_ptr": "*fp32"}
        sizes = ["num_tokens", "num_columns"]
    signature = {**pointers, **dict.fromkeys(sizes, "i32"), **dict.fromkeys(constants, "constexpr")}
    # Pointers and sizes that are multiples of 16, as those of a model are.
    given = range(len(pointers) + len(sizes))
    source = ASTSource(
        fn=function, signature=signature, constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in given},
    )  # fmt: skip
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert made.asm["cubin"]
    assert (
        kernel == "sweep"
        or "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in (made.asm["ptx"])
    )


@needs_gpu
class TestOnGpu:
    @pytest.mark.parametrize("text", ["2:4", "4:8", "unstructured:0.5"])
    @pytest.mark.parametrize("case", [0, 1, 2], ids=["free", "allowed", "fixed"])
    def test_sweep_equals_float64_also_when_replayed(self, text: str, case: int) -> None:
        pattern = Pattern.parse(text)
        for seed in (0, 1, 0):  # the second and the third replay what the first recorded
            weight, upper, allowed = problem(200, 320, seed)
            mask, is_fixed = masks_for(allowed)[case]
            expected, keep = sweep.sweep(weight, upper, pattern, 128, mask, is_fixed)
            pruned, kept = sweep.sweep(
                weight.float().cuda(), upper.float().cuda(), pattern, 128,
                None if mask is None else mask.cuda(), is_fixed,
            )  # fmt: skip
            # A near-tie that flips changes the rest of its row.
            rows = (kept.cpu() == keep).all(1)
            assert rows.float().mean() > 0.95
            torch.testing.assert_close(
                pruned.cpu().double()[rows], expected[rows], rtol=0, atol=1e-4
            )

    def test_sweep_of_a_weight_too_large_to_record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sparsify.kernels import _sweep_triton

        weight, upper = (t.float().cuda() for t in problem(40, 320)[:2])
        recorded = sweep.sweep(weight, upper, Pattern.parse("2:4"), 128)
        monkeypatch.setattr(_sweep_triton, "_MAX_GRAPH_ELEMENTS", 0)
        launched = sweep.sweep(weight, upper, Pattern.parse("2:4"), 128)
        assert all(torch.equal(a, b) for a, b in zip(recorded, launched, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_sums_of_products(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(1000, 300, generator=generator).to(dtype)
        exact = inputs.double().T @ inputs.double()
        total, cross = torch.zeros(300, 300).cuda(), torch.zeros(200, 300).cuda()
        gram.add_gram_(total, inputs.cuda())
        gram.add_cross_(cross, inputs[:, :200].cuda(), inputs.cuda())
        found = gram.mirror_upper_(total).cpu().double()
        # Products of 16-bit numbers are exact; a Hopper's tensor cores cut the sums instead of
        # rounding them: off by 5e-6 of the inputs' norms on an H200, by 1e-6 in float32.
        norms = inputs.double().norm(dim=0)
        most = 1e-5 * norms[:, None] * norms
        assert ((found - exact).abs() <= most).all()
        assert ((cross.cpu().double() - exact[:200]).abs() <= most[:200]).all()

    def test_full_precision_is_used_where_tf32_is_allowed_outside(self) -> None:
        inputs = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
        exact = inputs.double().T @ inputs.double()
        total, on_gpu = torch.zeros(128, 128).cuda(), inputs.cuda()
        with float32_products(allow_tf32=True):
            gram.add_gram_(total, on_gpu)
            products = (gram.mirror_upper_(total), on_gpu.T @ on_gpu)
        errors = [float((found.cpu().double() - exact).abs().max()) for found in products]
        # TF32 keeps 10 bits: errors near 2^-11 of numbers near 1, summed over 512 tokens.
        assert errors[0] < 1e-3 < errors[1]
