"""The op of packed 2:4 linear layers on a GPU: few tokens in one launch, many the fastest way.

Shape suffixes: O rows, I columns, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.kernels.cuda import choice
from sparsify.kernels.cuda.layout import COLUMNS, KINDS, ROWS, Prepared
from sparsify.kernels.cuda.ways import WAYS, Problem

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""of inputs"""


@torch.library.custom_op("twofour::packed_linear_cuda", mutates_args=(), device_types="cuda")
def packed_linear(
    inputs: Tensor,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    copies: list[Tensor],
    copy: str,
    kind: str,
    num_rows: int,
    group_size: int,
) -> Tensor:
    """x W^T + bias for a weight in the order of `layout.prepare`.

    Args:
        inputs: (..., I), bfloat16 or float16.
        values, positions, scales, zeros: of `layout.Prepared`.
        bias: (O,), any float type, or None.
        copies: what the way named `copy` holds beside the packed weight; else empty.
        copy: one of `ways.WAYS`, or "".
        kind: type of the values, one of `layout.KINDS`; bfloat16 and float16 take such inputs.
        num_rows: O.
        group_size: columns that share a scale; 0 where a row has one or none.

    Returns:
        (..., O) in the dtype of the inputs; sums and bias are float32 until then, in `decode`.

    Raises:
        InputError: shapes or dtypes that do not fit.

    Cost: up to 16 tokens one launch that reads the packed weight once.
    """
    return linear(
        inputs, Prepared(values, positions, scales, zeros), bias, copies, copy, kind, num_rows,
        group_size,
    )  # fmt: skip


@packed_linear.register_fake
def _(
    inputs: Tensor,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    copies: list[Tensor],
    copy: str,
    kind: str,
    num_rows: int,
    group_size: int,
) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], num_rows))


def linear(
    inputs: Tensor,
    prepared: Prepared,
    bias: Tensor | None,
    copies: list[Tensor],
    copy: str,
    kind: str,
    num_rows: int,
    group_size: int,
) -> Tensor:
    """`packed_linear` as a plain function; on the CPU it needs Triton's interpreter."""
    _check(inputs, prepared, kind, num_rows)
    num_columns = inputs.shape[-1]
    inputs_TI = inputs.reshape(-1, num_columns)
    if not len(inputs_TI):
        return inputs.new_empty(*inputs.shape[:-1], num_rows)
    has_zeros, dtype = prepared.zeros is not None, DTYPES[inputs.dtype]
    problem = Problem(kind, num_rows, num_columns, group_size, has_zeros, dtype)
    way = choice.used().way(problem, len(inputs_TI))
    if WAYS[way].copy is not None and way != copy:
        way = "expand"  # chosen for layers of this shape, but this one holds no copy
    output_TO = WAYS[way].run(problem, inputs_TI, prepared, bias, copies)
    return output_TO.view(*inputs.shape[:-1], num_rows)


def _check(inputs: Tensor, prepared: Prepared, kind: str, num_rows: int) -> None:
    if kind not in KINDS:
        raise InputError(f"packed linear: no kernel for {kind} on a GPU; use {', '.join(KINDS)}")
    if inputs.dtype not in DTYPES or (kind in DTYPES.values() and kind != DTYPES[inputs.dtype]):
        raise InputError(
            f"packed linear: inputs are {inputs.dtype}; {kind} weights on a GPU take "
            f"{kind if kind in DTYPES.values() else ' or '.join(DTYPES.values())}"
        )
    shape = -(-num_rows // ROWS), -(-inputs.shape[-1] // COLUMNS)
    if tuple(prepared.values.shape[:2]) != shape or inputs.shape[-1] % 4:
        raise InputError(
            f"packed linear: the weight has {tuple(prepared.values.shape[:2])} tiles and inputs "
            f"have {inputs.shape[-1]} columns; {num_rows} rows need {shape}"
        )
