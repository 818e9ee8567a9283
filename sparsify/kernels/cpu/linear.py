"""The op `twofour::packed_linear_cpu`: a packed 2:4 linear layer on a CPU.

A row is computed by one thread in one order, in float32: results do not depend on the number of
threads. They do depend, by rounding, on the path (instruction set) and on how many tokens come
together. Pruned weights are not multiplied, so an infinite input under one gives no NaN.

Shape suffixes: O rows, I columns, T tokens.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.kernels.cpu import reference
from sparsify.kernels.cpu.layout import COLUMNS, KINDS, ROWS, WITH_GROUPS, Prepared, chunk_bytes
from sparsify.kernels.cpu.library import PATHS, Job, library

_WIDEST = 16  # tokens at once

_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


def available_paths() -> tuple[str, ...]:
    """What `packed_linear` can be told to use here, the best last; compiles at the first call."""
    found = library()
    return ("torch", *(found.paths if found else ()))


@torch.library.custom_op("twofour::packed_linear_cpu", mutates_args=(), device_types="cpu")
def packed_linear(
    inputs: Tensor,
    blocks: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    kind: str,
    num_rows: int,
    group_size: int,
    path: str = "auto",
) -> Tensor:
    """x W^T + bias for a weight in the order of `layout.prepare`, never written densely.

    Args:
        inputs: (..., I), of any strides, float32 or bfloat16; other float types by way of float32.
        blocks: the first of `layout.Prepared`; uint8, on the CPU, as are the next two.
        scales: its scales, or None.
        zeros: its zeros, or None.
        bias: (O,), any float type, or None.
        kind: type of the values, one of `layout.KINDS`.
        num_rows: O.
        group_size: columns of the dense row that share a scale, a multiple of 4; of no meaning for
            kinds without groups or with one group a row.
        path: "auto" for the best of `available_paths`, or one of them.

    Returns:
        (..., O) in the dtype of the inputs; sums and bias are float32 until then.

    Raises:
        InputError: shapes that do not fit, or a path that this processor does not have.

    Cost: reads the packed weight once for each 16 tokens. Scratch memory: the inputs in float32.
    """
    num_columns = inputs.shape[-1]
    _check(inputs, blocks, scales, kind, num_rows, group_size)
    dtype = inputs.dtype if inputs.dtype == torch.bfloat16 else torch.float32
    inputs_TI = inputs.reshape(-1, num_columns).to(dtype)
    if inputs_TI.stride(1) != 1:
        inputs_TI = inputs_TI.contiguous()
    bias_O = None if bias is None else bias.to(torch.float32).contiguous()
    shape = (*inputs.shape[:-1], num_rows)
    found = library() if path != "torch" else None
    if path not in ("auto", "torch") and (found is None or path not in found.paths):
        raise InputError(
            f"packed linear: path {path} is not there; use one of: {', '.join(available_paths())}"
        )
    if found is None:
        output_TO = reference.linear(
            inputs_TI, Prepared(blocks, scales, zeros), bias_O, kind, num_rows, group_size
        )
        return output_TO.to(inputs.dtype).view(shape)
    output_TO = inputs_TI.new_empty(len(inputs_TI), num_rows)
    num_chunks = blocks.shape[1]
    padded = -(-len(inputs_TI) // _WIDEST) * _WIDEST
    scratch = torch.empty(padded * num_chunks * COLUMNS, dtype=torch.float32)
    num_groups = scales.shape[1] if scales is not None else 1
    job = Job(
        _pointer(inputs_TI), _pointer(output_TO), _pointer(blocks), _pointer(scales),
        _pointer(zeros), _pointer(bias_O), _pointer(scratch), len(inputs_TI), num_rows,
        num_columns, inputs_TI.stride(0), num_chunks, num_groups,
        group_size // 4 if num_groups > 1 else num_chunks * COLUMNS, _NUMBERS[kind],
        dtype == torch.bfloat16, torch.get_num_threads(),
        found.best if path == "auto" else PATHS.index(path),
    )  # fmt: skip
    found.handle.twofour_linear(ctypes.byref(job))
    return output_TO.to(inputs.dtype).view(shape)


@packed_linear.register_fake
def _(
    inputs: Tensor,
    blocks: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    kind: str,
    num_rows: int,
    group_size: int,
    path: str = "auto",
) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], num_rows))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(
    inputs: Tensor, blocks: Tensor, scales: Tensor | None, kind: str, num_rows: int, group_size: int
) -> None:
    num_columns = inputs.shape[-1]
    if kind not in KINDS:
        raise InputError(f"packed linear: unknown kind {kind}; use one of: {', '.join(KINDS)}")
    shape = (-(-num_rows // ROWS), -(-num_columns // COLUMNS), chunk_bytes(kind))
    if num_columns % 4 or tuple(blocks.shape) != shape or not blocks.is_contiguous():
        raise InputError(
            f"packed linear: blocks are {tuple(blocks.shape)} and inputs have {num_columns} "
            f"columns; {num_rows} rows of {kind} need contiguous blocks of {shape}"
        )
    if kind in WITH_GROUPS and scales is not None and scales.shape[1] > 1:
        num_groups = -(-num_columns // group_size) if group_size > 0 else 0
        if group_size % 4 or scales.shape[1] != num_groups:
            raise InputError(
                f"packed linear: {scales.shape[1]} groups of scales for {num_columns} columns in "
                f"groups of {group_size}; the group size must be a multiple of 4 that gives them"
            )
