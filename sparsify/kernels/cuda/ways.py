"""Ways to multiply by a packed 2:4 weight on a GPU, and what each holds beside the packed tensors.

`decode` and `expand` need nothing else. `dense` and `cusparselt` hold the weight once more, as a
dense matrix or in cuSPARSELt's form; so does `torchao`, which also rounds the inputs to float8 and
is therefore never taken unless it is asked for.

Shape suffixes: O rows, I columns, T tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.kernels.cuda.decode import MOST_TOKENS, decode
from sparsify.kernels.cuda.expand import expand
from sparsify.kernels.cuda.layout import ROWS, Prepared

_SCRATCH_BYTES = 2**24
"""of dense rows at a time: they stay in the level-2 cache until the product has read them"""

_MOST_FLOAT8 = 448.0


@dataclass(frozen=True)
class Problem:
    """What a layer's speed depends on, but for the number of tokens and the card."""

    kind: str
    """of values: one of `layout.KINDS`"""
    num_rows: int
    num_columns: int
    group_size: int
    has_zeros: bool
    dtype: str
    """of the inputs: bfloat16 or float16"""

    @property
    def name(self) -> str:
        """One word, for files and tables."""
        zeros = "-zeros" if self.has_zeros else ""
        size = f"{self.num_rows}x{self.num_columns}"
        return f"{size}-{self.kind}-g{self.group_size}{zeros}-{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the inputs."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float16


@dataclass(frozen=True)
class Way:
    """One way; `run` and `copy` say how."""

    run: Callable[[Problem, Tensor, Prepared, Tensor | None, Sequence[Tensor]], Tensor]
    """(problem, inputs (T, I), packed weight, bias, copies) to (T, O)"""
    copy: Callable[[Problem, Prepared], list[Tensor]] | None = None
    """makes what it holds beside the packed weight"""
    takes: Callable[[Problem], bool] = lambda problem: True
    """whether this machine and this problem have it"""
    is_exact: bool = True
    """whether inputs are multiplied as they are"""


def _decode(
    problem: Problem, inputs_TI: Tensor, prepared: Prepared, bias_O: Tensor | None,
    copies: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """In launches of at most 64 tokens."""
    given = prepared, bias_O, problem.kind, problem.num_rows, problem.group_size
    parts = [decode(some, *given) for some in inputs_TI.split(MOST_TOKENS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _expand(
    problem: Problem, inputs_TI: Tensor, prepared: Prepared, bias_O: Tensor | None,
    copies: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Some rows at a time become dense and are multiplied by cuBLAS."""
    num_rows, num_columns = problem.num_rows, problem.num_columns
    step = max(1, _SCRATCH_BYTES // (num_columns * inputs_TI.element_size() * ROWS)) * ROWS
    output_TO = inputs_TI.new_empty(len(inputs_TI), num_rows)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        dense_RI = _dense_rows(problem, prepared, rows, inputs_TI.dtype)
        torch.mm(inputs_TI, dense_RI.T, out=output_TO[:, rows])
    return output_TO if bias_O is None else output_TO.add_(bias_O)


def _dense_rows(problem: Problem, prepared: Prepared, rows: slice, dtype: torch.dtype) -> Tensor:
    return expand(prepared, problem.kind, problem.num_columns, problem.group_size, rows, dtype)


def dense_weight(problem: Problem, prepared: Prepared) -> Tensor:
    """The whole weight (O, I) in the dtype of the inputs."""
    return _dense_rows(problem, prepared, slice(0, problem.num_rows), problem.torch_dtype)


def _dense(
    problem: Problem, inputs_TI: Tensor, prepared: Prepared, bias_O: Tensor | None,
    copies: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    bias_O = None if bias_O is None else bias_O.to(inputs_TI.dtype)
    return functional.linear(inputs_TI, copies[0], bias_O)


def _cusparselt(
    problem: Problem, inputs_TI: Tensor, prepared: Prepared, bias_O: Tensor | None,
    copies: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """As torch.sparse.to_sparse_semi_structured does it: inputs padded to 8 tokens."""
    padded_TI = functional.pad(inputs_TI, (0, 0, 0, -len(inputs_TI) % 8))
    bias_O = None if bias_O is None else bias_O.to(inputs_TI.dtype)
    product_TO = torch._cslt_sparse_mm(
        copies[0], padded_TI.T, bias=bias_O, transpose_result=True
    )  # written row by row of the tokens
    return product_TO[: len(inputs_TI)]


def _has_cusparselt(problem: Problem) -> bool:
    fits = problem.num_rows % 16 == 0 and problem.num_columns % 16 == 0
    return fits and torch.backends.cusparselt.is_available()


def _torchao(
    problem: Problem, inputs_TI: Tensor, prepared: Prepared, bias_O: Tensor | None,
    copies: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """float8 by float8, with a scale a token and a scale a row."""
    scale_T1 = (inputs_TI.float().abs().amax(1, keepdim=True) / _MOST_FLOAT8).clamp(min=1e-12)
    rounded_TI = (inputs_TI.float() / scale_T1).to(torch.float8_e4m3fn)
    weight, meta, scale_O = copies
    output_TO: Tensor = torch.ops.torchao.rowwise_scaled_linear_sparse_cutlass_f8f8(
        rounded_TI, scale_T1[:, 0], weight, meta, scale_O, None, inputs_TI.dtype
    )
    return output_TO if bias_O is None else output_TO + bias_O.to(inputs_TI.dtype)


def _torchao_copies(problem: Problem, prepared: Prepared) -> list[Tensor]:
    scales = prepared.scales
    assert scales is not None, "float8 has a scale a row"
    # Codes alone, as float8: with scales of 1 the dense weight is what is stored.
    codes = prepared._replace(scales=torch.ones_like(scales))
    codes_OI = dense_weight(problem, codes).to(torch.float8_e4m3fn)
    weight, meta = torch.ops.torchao.to_sparse_semi_structured_cutlass_sm9x_f8(codes_OI)
    return [weight, meta, scales[: problem.num_rows].contiguous()]


def _has_torchao(problem: Problem) -> bool:
    """Hopper, float8 and torchao with its kernels (0.18 has them)."""
    if problem.kind != "float8" or problem.num_rows % 16 or problem.num_columns % 16:
        return False
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return False
    try:
        importlib.import_module("torchao.ops")
    except Exception:  # an import of a package that is no dependency may fail in any way
        return False
    ops: Any = torch.ops.torchao
    return hasattr(ops, "to_sparse_semi_structured_cutlass_sm9x_f8")


WAYS = {
    "decode": Way(_decode),
    "expand": Way(_expand),
    "dense": Way(_dense, lambda problem, prepared: [dense_weight(problem, prepared)]),
    "cusparselt": Way(
        _cusparselt,
        lambda problem, prepared: [torch._cslt_compress(dense_weight(problem, prepared))],
        _has_cusparselt,
    ),
    "torchao": Way(_torchao, _torchao_copies, _has_torchao, is_exact=False),
}
