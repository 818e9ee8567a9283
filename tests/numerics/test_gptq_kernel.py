"""GPTQ's kernels: against the PyTorch code and the float64 oracle, and how often a GPU is called.

As in `test_kernels`, Triton's interpreter runs them in a process of its own, and they are compiled
for a GPU here.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.benchmarks.support.families import random_family
from sparsify.calibration.layers import Layer, prunable_linears
from sparsify.calibration.moments import InputMoments
from sparsify.comm import Comm
from sparsify.costs import memory as costs
from sparsify.kernels import _gptq_triton
from sparsify.kernels.rounding import Segment
from sparsify.methods import PruneParams, get_method
from sparsify.models.blocks import BlocksInMemory
from sparsify.models.unfuse import unfuse_experts
from sparsify.params import QuantParams
from sparsify.pruning import prune
from sparsify.pruning.one_pass import OnePass
from sparsify.quantization import Quantized, descent, quantize, quantize_weight, scales, segments
from sparsify.quantization.gptq import Inputs, gptq
from sparsify.quantization.schemes import get_scheme
from sparsify.quantization.weight import quantize_rows
from tests.numerics.test_kernels import needs_gpu, needs_triton
from tests.numerics.test_packed_linear_cuda import disassembled
from tests.numerics.test_quantize import layer, mask_of, oracle
from tests.numerics.test_schemes import CASES, PATTERN, params_of, problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_kernels(patch: pytest.MonkeyPatch, use: bool = True) -> None:
    """Take kernels on any device, or on none."""
    for module in (segments, scales, descent):
        patch.setattr(
            module, "kernel_rounding", lambda values, grid: grid.rounding if use else None
        )


def plain(found: Quantized) -> list[Tensor]:
    """Codes, scales and zeros as numbers."""
    parts = (found.codes.values_OI, found.codes.scales_OG, found.codes.zeros_OG)
    return [part.double() for part in parts if part is not None]


class StandIn:
    """In place of a kernel: one operation, the argument of this place plus 1."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *tensors, **_: tensors[self._place].add_(1)


def is_view(func: Any) -> bool:
    """Whether an operation's results lie in what it is given."""
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


class Launches(TorchDispatchMode):
    """Counts what a GPU would be called for: all operations but views and new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        has_none = any(word in func._schema.name for word in ("empty", "_unsafe_view"))
        self.count += not is_view(func) and not has_none
        return func(*args, **(kwargs or {}))


def launches(params: QuantParams, num_columns: int = 1024, num_stacked: int = 1) -> float:
    """Per 128 columns, of the elimination and all eight sweeps of the descent."""
    parts = problem(0, 2, num_columns)
    names = [f"layer {index}" for index in range(num_stacked)]
    if num_stacked > 1:
        parts = tuple(part.expand(num_stacked, -1, -1).contiguous() for part in parts)
    weight, keep, hessian = parts
    scheme = get_scheme(params.scheme)
    size, grid = scheme.group_size_of(params, num_columns), scheme.grid(params)
    inputs = Inputs.of(hessian, hessian, size, params.damping, *names)
    with Launches() as counted:
        gptq(weight, keep, inputs, grid, size, params)
    return counted.count * 128 / num_columns


def use_stand_ins(patch: pytest.MonkeyPatch) -> None:
    """The search writes scales, the elimination levels; the descent's levels never come to rest."""
    for name, place in (("search", 4), ("eliminate", 1), ("descend", 1)):
        patch.setattr(_gptq_triton, f"_{name}_kernel", StandIn(place))
    use_kernels(patch)


def stack_of_three(
    num_rows: int, num_columns: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, masks and Hessians whose columns matter in other orders; some inputs of the second
    are dead, and the third's weights are small, a row of them zero."""
    layers = [problem(seed, num_rows, num_columns) for seed in range(3)]
    weights, masks, hessians = map(list, zip(*layers, strict=True))
    hessians[1][[3, 20]] = 0
    hessians[1][:, [3, 20]] = 0
    weights[2] *= 1e-3
    weights[2][1] = 0
    return weights, masks, hessians


def solved_together(
    params: QuantParams, num_rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu",
    num_columns: int = 40,
) -> tuple[Quantized, list[Quantized]]:  # fmt: skip
    """As a stack, and each by itself."""
    weights, masks, hessians = stack_of_three(num_rows, num_columns)
    parts = [
        [part.to(device) for part in masks] if found is masks
        else [part.to(device, dtype) for part in found]
        for found in (weights, masks, hessians)
    ]  # fmt: skip
    names = [f"layer {index}" for index in range(3)]
    alone = [quantize_weight(*part, params, n) for *part, n in zip(*parts, names, strict=True)]
    weight, keep, hessian = map(torch.stack, parts)
    inputs = None
    if params.method == "gptq":
        size = get_scheme(params.scheme).group_size_of(params, weight.shape[-1])
        inputs = Inputs.of(hessian, None, size, params.damping, *names)
    return quantize_rows(weight, keep, inputs, params, names), alone


def share_of_equal_rows(together: Quantized, alone: list[Quantized]) -> float:
    """Rows of a stack whose codes are those that they have alone."""
    mine, theirs = plain(together)[0], torch.stack([plain(found)[0] for found in alone])
    return float((mine == theirs).all(-1).double().mean())


@needs_triton
@pytest.mark.parametrize("size", [32, 64, 128, -1])
@pytest.mark.parametrize(("scheme", "symmetric"), CASES)
def test_at_most_100_launches_for_128_columns(
    scheme: str, symmetric: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size != -1 and not get_scheme(scheme).has_groups:
        size = -1
    use_stand_ins(monkeypatch)
    found = launches(QuantParams(scheme=scheme, group_size=size, symmetric=symmetric))
    # A kernel and a product for a segment and sweep; counted: 85 in groups of 32, 25 of 128.
    assert 2 * 9 < found <= 100


@needs_triton
@pytest.mark.parametrize("size", [32, 96, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_stack_takes_the_launches_of_one(
    symmetric: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_ins(monkeypatch)
    params = QuantParams(scheme="int4", group_size=size, symmetric=symmetric)
    found = [launches(params, 256, num_stacked) for num_stacked in (1, 8, 128)]
    assert found[0] > 2 * 9 and found == found[:1] * 3


def test_what_is_known_of_inputs_takes_as_many_launches_for_more_of_them() -> None:
    _, _, hessian = problem(0, 2, 64)
    counts = []
    for num_stacked in (8, 128):
        stack = hessian.expand(num_stacked, -1, -1).contiguous()
        with Launches() as counted:
            Inputs.of(stack, stack, 32, 0.01, *map(str, range(num_stacked)))
        counts.append(counted.count)
    assert counts[0] == counts[1]


class Memory(TorchDispatchMode):
    """Follows the bytes of all tensors that are made inside and still there."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        found = func(*args, **(kwargs or {}))
        if is_view(func):
            return found
        for made in found if isinstance(found, tuple | list) else [found]:
            storage = made.untyped_storage() if isinstance(made, Tensor) else None
            if storage is not None and id(storage) not in self._seen:
                self._seen.add(id(storage))
                self._held += storage.nbytes()
                weakref.finalize(storage, self._let_go, id(storage), storage.nbytes())
                self.peak = max(self.peak, self._held)
        return found

    def _let_go(self, storage: int, num_bytes: int) -> None:
        self._seen.discard(storage)
        self._held -= num_bytes


@needs_triton
@pytest.mark.parametrize(
    ("kind", "inner", "expected"),
    [("up", 64, (6.8, 7.1)), ("up", 256, (12.6, 10.6)), ("down", 64, (9.6, 8.3))],
)
def test_memory_of_a_stack_is_known(
    kind: str, inner: int, expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a walk's solver of a stack makes and holds at once, in one walk with pruning and alone:
    in units of the stack's largest matrix in float32, by which stacks are cut."""
    use_stand_ins(monkeypatch)
    model = random_family(
        "qwen3_moe", hidden_size=256, moe_intermediate_size=inner, num_hidden_layers=1
    )
    unfuse_experts(model)
    source, comm, params = BlocksInMemory(model), Comm.single(), QuantParams(group_size=32)
    modules = {n: m for _, n, m in prunable_linears(model) if n.endswith(f".{kind}_proj")}
    masks = {name: module.weight > 0 for name, module in modules.items()}
    _, num_columns = shape = next(iter(masks.values())).shape
    _, _, hessian = problem(0, 2, num_columns)
    both = prune._Run(
        source, get_method("sparsegpt"), PATTERN, PruneParams(), comm, prune.LayerChoice(), None,
        OnePass(params),
    )  # fmt: skip
    alone = quantize._Run(source, masks, params, comm, ())
    found = []
    for run, cross in ((both, None), (alone, hessian)):  # the last spoils the weights
        layers = [
            Layer(name, module, 0, InputMoments(hessian.clone(), 9, cross))
            for name, module in modules.items()
        ]
        for each in layers:
            each.moments.factor(PruneParams().damping, each.name)
        with torch.no_grad(), Memory() as followed:
            run._solve(layers)
        found.append(followed.peak / (4 * len(layers) * num_columns * max(shape)))
    assert found == pytest.approx(expected, abs=0.2)
    # The plan has the means of both moments and the factor with the Hessians.
    planned = costs._SOLVER_COPIES["gptq"] * shape.numel()
    planned += (costs._GPTQ_SQUARES + 2 + 1.5) * num_columns**2
    assert found[1] == pytest.approx(planned / (num_columns * max(shape)), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("size", [16, 24, -1])
@pytest.mark.parametrize(("scheme", "symmetric"), CASES)
def test_a_stack_is_its_layers(
    scheme: str, symmetric: bool, size: int, method: str, dtype: torch.dtype
) -> None:
    """In PyTorch's operations. A product of a stack may add up in another order, so that in float32
    a value near the middle of two levels may flip, and with it the rest of its row; no value is
    that near in float64, where a scale may still be stored as the half beside."""
    if size != -1 and not get_scheme(scheme).has_groups:
        pytest.skip("it has no groups")
    params = QuantParams(method, scheme, size, symmetric, block_size=16)
    together, alone = solved_together(params, 20, dtype)
    equal = share_of_equal_rows(together, alone)
    if dtype == torch.float32:
        assert equal > 0.9
    else:
        assert equal == 1
        expected = torch.stack([found.weight_OI for found in alone])
        torch.testing.assert_close(together.weight_OI, expected, rtol=2**-10, atol=0)


def test_pytorch_is_called_for_every_column() -> None:
    """What the kernels save, and that the count can tell."""
    params = QuantParams(group_size=128, num_refine_sweeps=1)
    assert launches(params, 256) > 128 * 2 * 7


if INTERPRETED:

    class TestInterpreted:
        """Run by tests/integration/test_processes.py."""

        @pytest.mark.parametrize("pattern", ["2:4", "dense"])
        def test_codes_and_scales_equal_the_oracle(
            self, pattern: str, monkeypatch: pytest.MonkeyPatch
        ) -> None:
            use_kernels(monkeypatch)
            weight, hessian = layer(num_rows=3)
            keep = mask_of(weight, pattern)
            params = QuantParams(group_size=16, num_scale_steps=8, num_refine_sweeps=0)
            got = quantize_weight(weight.float(), keep, hessian.float(), params, "layer")
            codes, found_scales = oracle(weight, keep, hessian, params)
            assert torch.equal(got.codes.scales_OG, found_scales)
            assert torch.equal(got.codes.values_OI, codes)

        @pytest.mark.parametrize(("scheme", "symmetric"), CASES)
        def test_codes_equal_those_of_pytorch(
            self, scheme: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
        ) -> None:
            """Two programs with rows left over, a short last group; or segments of one channel."""
            weight, keep, hessian = problem(len(scheme), num_rows=18)
            weight[2], weight[3] = 0, 1e-9
            params = params_of(
                scheme, symmetric, num_scale_steps=3, num_refine_sweeps=2, block_size=16
            )
            expected = quantize_weight(weight, keep, hessian, params, "layer")
            rough = quantize_weight(weight, keep, hessian, replace(params, method="rtn"), "layer")
            use_kernels(monkeypatch)
            got = quantize_weight(weight, keep, hessian, params, "layer")
            for mine, theirs in zip(plain(got), plain(expected), strict=True):
                assert torch.equal(mine, theirs)
            assert torch.equal(got.weight_OI, expected.weight_OI)
            assert not torch.equal(plain(got)[0], plain(rough)[0])

        def test_a_scale_is_refit_beside_the_kernel_where_its_group_has_several_segments(
            self, monkeypatch: pytest.MonkeyPatch
        ) -> None:
            weight, keep, hessian = problem(1, num_rows=4)
            params = QuantParams(
                group_size=24, block_size=16, num_scale_steps=3, num_refine_sweeps=2
            )
            expected = plain(quantize_weight(weight, keep, hessian, params, "layer"))
            use_kernels(monkeypatch)
            got = plain(quantize_weight(weight, keep, hessian, params, "layer"))
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))

        @pytest.mark.parametrize(
            ("scheme", "symmetric", "method"),
            [("int4", False, "gptq"), ("nf4", True, "gptq"), ("fp8", True, "gptq"),
             ("int4", False, "rtn")],
        )  # fmt: skip
        def test_a_stack_is_its_layers(
            self, scheme: str, symmetric: bool, method: str, monkeypatch: pytest.MonkeyPatch
        ) -> None:
            """Two programs for each, rows left over; a short last group, or several segments. As
            in PyTorch, products between the kernels may add up in another order."""
            use_kernels(monkeypatch)
            params = params_of(
                scheme, symmetric, method, num_scale_steps=3, num_refine_sweeps=2, block_size=16
            )
            assert share_of_equal_rows(*solved_together(params, 18)) > 0.9

        @pytest.mark.parametrize(("scheme", "symmetric"), CASES)
        def test_every_value_gets_the_level_of_pytorch(
            self, scheme: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
        ) -> None:
            """Ties, the ends of the range, numbers near 0 of both signs; a scale of 0; pruned."""
            grid = get_scheme(scheme).grid(params_of(scheme, symmetric))
            assert grid.rounding is not None
            top = max(grid.highest, 1.0)
            powers = 2.0 ** torch.arange(-12, 9)
            halves = torch.arange(-19, 19) / 2  # with a scale of a power of two: ties
            some = torch.linspace(-1.2 * top, 1.2 * top, 27)
            values = torch.cat([powers, -powers, powers * 1.0625, halves, some, torch.zeros(1)])
            assert len(values) <= 129
            values = torch.stack([values[:128], values[:128] * 0.5, values[:128]])
            scales_3 = torch.tensor([1.0, 0.5, 0.0])
            keep = torch.ones(3, 128, dtype=torch.bool)
            keep[0, ::7] = False
            zeros_3 = None if symmetric else torch.tensor([5.0, 0.0, grid.rounding.highest])
            nothing = torch.full_like(values, 9.0)
            segment = Segment(values, nothing, keep, torch.eye(128), scales_3, zeros_3)
            error = _gptq_triton.eliminate_(segment, grid.rounding)
            zeros = None if zeros_3 is None else zeros_3[:, None]
            expected = grid.nearest(values, scales_3[:, None], zeros).masked_fill_(~keep, 0.0)
            assert torch.equal(segment.levels_OB, expected)
            assert torch.equal(error, values - expected * scales_3[:, None])
            if scheme == "fp8":  # whose codes tell -0 from 0
                assert torch.equal(segment.levels_OB.signbit(), expected.signbit())


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        ("search", {"KIND": 0, "LEVELS": 0, "HAS_ZEROS": True, "IS_HALF": True}),
        ("eliminate", {"KIND": 2, "LEVELS": 16, "HAS_ZEROS": False, "IS_HALF": True}),
        ("descend", {"KIND": 1, "LEVELS": 0, "HAS_ZEROS": False, "IS_HALF": False}),
    ],
)
def test_kernels_compile_for_a_gpu(
    kernel: str, constants: dict[str, Any], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code of compute capability 9.0; what a program holds stays in registers: the
    stack is for the call of a division's rare cases."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = getattr(_gptq_triton, f"_{kernel}_kernel")
    more = {"search": {}, "eliminate": {"WIDTH": 128},
            "descend": {"WIDTH": 128, "REFITS": True, "INNER": 16}}  # fmt: skip
    # The elimination's weight is transposed, and the descent's is not.
    ones = {"search": ["row_stride"], "eliminate": ["row_stride", "error_row_stride"],
            "descend": ["column_stride", "change_column_stride"]}  # fmt: skip
    constants = {**constants, **more[kernel], **dict.fromkeys(ones[kernel], 1), "R": 16, "B": 128}
    types = {"keep_ptr": "*i1", "lowest": "fp32", "highest": "fp32", "largest": "fp32"}
    names = function.arg_names
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
                 for name in names} | dict.fromkeys(constants, "constexpr")  # fmt: skip
    pointers = [index for index, name in enumerate(names) if name.endswith("_ptr")]
    source = ASTSource(
        fn=function, signature=signature, constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in pointers},
    )  # fmt: skip
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    _, registers, stack, local = disassembled(made)
    assert registers <= 255 and stack <= 32 and local == 0


@needs_gpu
class TestOnGpu:
    @pytest.mark.parametrize("size", [32, 128, -1])
    @pytest.mark.parametrize(("scheme", "symmetric"), CASES)
    def test_nearly_all_rows_equal_those_of_pytorch(
        self, scheme: str, symmetric: bool, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A value near the middle of two levels that flips changes the rest of its row."""
        if size != -1 and not get_scheme(scheme).has_groups:
            pytest.skip("it has no groups")
        weight, keep, hessian = (part.cuda() for part in problem(0, 200, 320))
        params = QuantParams(scheme=scheme, group_size=size, symmetric=symmetric)
        got = quantize_weight(weight, keep, hessian, params, "layer")
        use_kernels(monkeypatch, False)
        expected = quantize_weight(weight, keep, hessian, params, "layer")
        rows = (got.weight_OI == expected.weight_OI).all(1)
        assert rows.float().mean() > 0.9
        assert not got.weight_OI[~keep].any()
        errors = []
        for found in (got, expected):
            change = weight - found.weight_OI
            errors.append(float(((change @ hessian) * change).sum()))
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)

    @pytest.mark.parametrize("method", ["gptq", "rtn"])
    @pytest.mark.parametrize(("scheme", "symmetric"), CASES)
    def test_nearly_all_rows_of_a_stack_are_those_of_its_layers(
        self, scheme: str, symmetric: bool, method: str
    ) -> None:
        """As above: a stack's products may have other last bits."""
        size = 32 if get_scheme(scheme).has_groups else -1
        params = QuantParams(method, scheme, size, symmetric)
        together, alone = solved_together(params, 200, device="cuda", num_columns=320)
        assert together.weight_OI.is_cuda and share_of_equal_rows(together, alone) > 0.9
