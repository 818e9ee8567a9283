"""One linear layer as each side of `bench deploy --device cuda` holds it, and clocks for it.

Every side has copies of its weight, four level-2 caches together, and one CUDA graph that runs all
of them in turn. So neither caches nor launches from Python are in its times. Shape suffixes: O
rows, I columns, T tokens, G groups of 128 columns.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.kernels.cuda.card import chosen_copy, elapsed_s
from sparsify.kernels.cuda.choice import FEW_TOKENS, Choices
from sparsify.kernels.cuda.layout import KINDS, Prepared, prepare
from sparsify.kernels.cuda.linear import packed_linear
from sparsify.kernels.cuda.ways import Problem
from sparsify.kernels.triton_jit import jit, tl
from sparsify.packed.layer import unpack_layer
from sparsify.packed.layout import Layer, Scheme
from sparsify.pattern import Pattern

GROUP_SIZE = 128

_CALIBRATION_BYTES = 2**31

_TYPES = {"int4": "int", "int8": "int", "nf4": "nf4", "float8": "fp8"}

_BITS = {"int4": 4, "int8": 8, "nf4": 4}

_WHOLE_TILES = ((1024, 4096), (14368, 2048))


@dataclass(frozen=True)
class Side:
    """A layer that can be timed."""

    num_bytes: int
    """what one product reads of the weight"""
    calls: list[Callable[[Tensor], Tensor]]
    """one for each copy of the weight: (T, I) bfloat16 to (T, O)"""


def sides_of(
    rows: int, columns: int, kinds: list[str], choices: Choices, most_tokens: int
) -> dict[str, Side]:
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    least_bytes = 4 * cache_bytes
    weight_OI = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    sides = {
        "dense bfloat16": _copied(
            weight_OI.nbytes, least_bytes, lambda: _dense_call(weight_OI.clone())
        )
    }
    if columns % 128 == 0 and rows % 16 == 0:
        int4, packed, scales_GO2 = torch_int4(rows, columns)
        sides["dense int4"] = _copied(
            packed.nbytes + scales_GO2.nbytes, least_bytes,
            lambda: _int4_call(int4, packed.clone(), scales_GO2.clone()),
        )  # fmt: skip
    for kind in kinds:
        size = GROUP_SIZE if kind in ("int8", "int4", "nf4") else 0
        prepared = random_prepared(kind, rows, columns, size)
        problem = Problem(kind, rows, columns, size, False, "bfloat16")
        copies, name = _chosen_copies(problem, prepared, choices, most_tokens)
        num_bytes = sum(tensor.nbytes for tensor in prepared if tensor is not None)
        sides[kind] = _copied(
            num_bytes, least_bytes,
            lambda given=prepared, extra=copies, copy=name, of=problem: _packed_call(  # type: ignore[misc]
                given, extra, copy, of
            ),
        )  # fmt: skip
    return sides


def _chosen_copies(
    problem: Problem, prepared: Prepared, choices: Choices, most_tokens: int
) -> tuple[list[Tensor], str]:
    """What the chosen way holds, measured first if any batch is large enough to need a choice."""
    if most_tokens <= FEW_TOKENS:
        return [], ""
    copy, copies = chosen_copy(problem, prepared, choices)
    return copies, copy


def _copied(
    num_bytes: int, least_bytes: int, make: Callable[[], Callable[[Tensor], Tensor]]
) -> Side:
    return Side(num_bytes, [make() for _ in range(max(2, -(-least_bytes // num_bytes)))])


def _dense_call(weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.linear(x, weight_OI)


def torch_int4(rows: int, columns: int) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """torch's dense INT4 (tinygemm), random: the call, codes, scale and zero of 128 columns."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    groups = columns // GROUP_SIZE
    scales_GO2 = torch.rand(groups, rows, 2, device="cuda", dtype=torch.bfloat16)

    def call(x: Tensor, packed: Tensor, scales_GO2: Tensor) -> Tensor:
        output: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, GROUP_SIZE, scales_GO2)
        return output

    return call, packed, scales_GO2


def _int4_call(
    call: Callable[..., Tensor], packed: Tensor, scales_GO2: Tensor
) -> Callable[[Tensor], Tensor]:
    return lambda x: call(x, packed, scales_GO2)


def _packed_call(
    prepared: Prepared, copies: list[Tensor], copy: str, problem: Problem
) -> Callable[[Tensor], Tensor]:
    """A product with copies of its own of everything."""
    own = [None if tensor is None else tensor.clone() for tensor in prepared]
    copies = [tensor.clone() for tensor in copies]

    def call(x: Tensor) -> Tensor:
        output: Tensor = packed_linear(
            x, *own, None, copies, copy, problem.kind, problem.num_rows, problem.group_size
        )
        return output

    return call


def random_parts(
    kind: str, rows: int, columns: int, group_size: int, has_zeros: bool = False,
    device: str = "cuda",
) -> tuple[Layer, dict[str, Tensor]]:  # fmt: skip
    """A random packed 2:4 layer as a file holds it."""

    def numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, device=device, dtype=torch.uint8)

    pairs = [a | b << 2 for a, b in itertools.combinations(range(4), 2)]
    nibbles_OG = torch.tensor(pairs, device=device, dtype=torch.uint8)[
        numbers(6, rows, columns // 4).int()
    ]
    nibbles_OG = functional.pad(nibbles_OG, (0, columns // 4 % 2))
    parts = {"weight_indices": nibbles_OG[:, ::2] | nibbles_OG[:, 1::2] << 4}
    kept, bits = columns // 2, _BITS.get(kind)
    if bits == 4:
        parts["weight"] = numbers(256, rows, kept // 2)
    elif bits == 8:
        codes = numbers(256, rows, kept)
        parts["weight"] = codes if has_zeros else codes.view(torch.int8)
    else:
        parts["weight"] = torch.randn(rows, kept, device=device).to(KINDS[kind])
    groups = -(-columns // group_size) if group_size else 1
    if bits:
        parts["weight_scales"] = torch.rand(rows, groups, device=device).half()
    elif kind == "float8":
        parts["weight_scales"] = torch.rand(rows, 1, device=device)
    if has_zeros:
        parts["weight_zeros"] = numbers(16 if bits == 4 else 256, rows, groups)
    size = (group_size or columns) if bits else None
    scheme = Scheme(_TYPES.get(kind, "float"), bits, size, symmetric=not has_zeros)
    return Layer((rows, columns), scheme, Pattern.parse("2:4")), parts


def random_prepared(
    kind: str, rows: int, columns: int, group_size: int, device: str = "cuda"
) -> Prepared:
    """The same in the order of the GPU kernels, symmetric."""
    parts = random_parts(kind, rows, columns, group_size, device=device)[1]
    return prepare(
        kind, columns, group_size, parts["weight"], parts["weight_indices"],
        parts.get("weight_scales"),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A packed layer whose products are held against float64."""

    kind: str
    group_size: int
    has_zeros: bool
    rows: int = 200
    columns: int = 1100
    tokens: tuple[int, ...] = (1, 2, 7, 8, 13, 16, 64, 200)


def cases_of(kinds: list[str]) -> list[Case]:
    """Every kind, size of groups and number of tokens: cut tiles, then narrow and wide layers'."""
    found = []
    for kind in kinds:
        groups = [(0, False)]
        if kind in _BITS:
            groups += [(size, False) for size in (32, 64, 128, 256)]
        if kind in ("int4", "int8"):
            groups += [(64, True), (0, True)]
        for group in groups:
            found.append(Case(kind, *group))
            found += [Case(kind, *group, *shape, (1, 16, 64)) for shape in _WHOLE_TILES]
    return found


def errors_of(case: Case, device: str = "cuda") -> list[dict[str, Any]]:
    """How far a packed layer's products are from float64, for each number of tokens.

    The weight is unpacked by the reader of packed folders, in PyTorch. An error is the norm of the
    difference over that of the result; bfloat16 results alone are rounded by 1.7e-3.
    """
    kind, size, rows, columns = case.kind, case.group_size, case.rows, case.columns
    layer, parts = random_parts(kind, rows, columns, size, case.has_zeros, device)
    weight_OI = unpack_layer(layer, parts, torch.float32).double()
    names = ("weight", "weight_indices", "weight_scales", "weight_zeros")
    prepared = prepare(kind, columns, size, *(parts.get(name) for name in names))  # type: ignore[arg-type]
    found = []
    for number in case.tokens:
        x_TI = torch.randn(number, columns, device=device).bfloat16()
        output_TO = packed_linear(x_TI, *prepared, None, [], "", kind, rows, size)
        exact_TO = x_TI.double() @ weight_OI.T
        error = (output_TO.double() - exact_TO).norm() / exact_TO.norm()
        found.append({**asdict(case), "tokens": number, "error": float(error)})
    return found


def errors_of_all(kinds: list[str]) -> list[dict[str, Any]]:
    """The same of all cases, in processes side by side: the most of it is compiling kernels."""
    cases = cases_of(kinds)
    num_processes = min(len(cases), max(1, (os.cpu_count() or 1) - 2), 12)
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        return list(itertools.chain.from_iterable(pool.map(errors_of, cases)))


def recorded(side: Side, inputs_TI: Tensor) -> torch.cuda.CUDAGraph:
    """All copies in turn, as a CUDA graph; what is compiled at a first call is so before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in side.calls[:2]:
            call(inputs_TI)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in side.calls:
            call(inputs_TI)
    return graph


def read_bytes_per_s() -> float:
    """What a kernel reaches that only reads, 16 bytes a lane, 2 GiB."""
    given = torch.randint(0, 255, (_CALIBRATION_BYTES // 4,), dtype=torch.int32, device="cuda")
    num_programs = 16 * torch.cuda.get_device_properties(0).multi_processor_count
    sums = torch.empty(num_programs, dtype=torch.int32, device="cuda")

    def read() -> None:
        read_kernel[(num_programs,)](given, sums, given.numel(), BLOCK=4096, num_warps=8)

    read()
    return given.nbytes / statistics.median(elapsed_s(read) for _ in range(9))


def copy_bytes_per_s() -> float:
    """Bytes read and written a second of a copy of 2 GiB."""
    given = torch.empty(_CALIBRATION_BYTES, dtype=torch.uint8, device="cuda").random_()
    copied = torch.empty_like(given)
    copied.copy_(given)
    times = [elapsed_s(lambda: copied.copy_(given)) for _ in range(9)]
    return 2 * given.nbytes / statistics.median(times)


@jit
def read_kernel(
    given_ptr: tl.tensor, sums_ptr: tl.tensor, num_words: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Sum of the words that program_id(0) reads, so that none of the loads is left out."""
    total = tl.zeros((BLOCK,), tl.int32)
    block = tl.program_id(0)
    for start in range(block * BLOCK, num_words, tl.num_programs(0) * BLOCK):
        words = given_ptr + start + tl.arange(0, BLOCK)
        total += tl.load(words, eviction_policy="evict_first")
    tl.store(sums_ptr + block, tl.sum(total))
