"""The op `twofour::dense_linear_cpu`: a dense bfloat16 layer on a CPU, for few tokens.

The layers that a packed model keeps dense, its head above all, are most of what a small one reads
for a token: of a Llama of 1B parameters in 2:4 INT4 58 %. torch's own product reads a bfloat16
weight at half of what memory gives; this one at nearly all of it.

Shape suffixes: O rows, I columns, T tokens.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparsify.kernels.cpu.library import PATHS, DenseJob, library

_MOST_TOKENS = 4  # with more, torch's product does as well; source/rows.h has no more

_LEAST_WEIGHTS = 2**15  # below, a call costs more (18 us) than torch's

_COLUMNS = 32  # of a row, a multiple: two of the widest vectors


@torch.compiler.assume_constant_result  # of a process, that is
def _has_library() -> bool:
    return library() is not None


def takes(inputs: Tensor, weight: Tensor) -> bool:
    """Whether `dense_linear` is to compute this product; compiles the library where it may.

    Args:
        inputs: (..., I).
        weight: (O, I).
    """
    return (
        weight.dtype == inputs.dtype == torch.bfloat16
        and weight.device.type == inputs.device.type == "cpu"
        and 0 < inputs.numel() <= _MOST_TOKENS * weight.shape[1]
        and inputs.shape[-1] == weight.shape[1]
        and weight.shape[1] % _COLUMNS == 0
        and weight.numel() >= _LEAST_WEIGHTS
        and weight.is_contiguous()
        and _has_library()
    )


@torch.library.custom_op("twofour::dense_linear_cpu", mutates_args=(), device_types="cpu")
def dense_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, path: str = "auto") -> Tensor:
    """x W^T + bias of what `takes` takes; no gradient.

    Args:
        inputs: (..., I), bfloat16, of any strides.
        weight: (O, I), bfloat16.
        bias: (O,), any float type, or None.
        path: "auto" for the best of the library's `paths`, or one of them.

    Returns:
        (..., O), bfloat16; sums and bias are float32 until then. A row is computed by one thread
        in one order, so their number changes no bit.

    Cost: reads the weight once. Scratch memory: the inputs in float32.
    """
    found = library()
    assert found is not None, "see `takes`"
    inputs_TI = inputs.reshape(-1, weight.shape[1])
    if inputs_TI.stride(1) != 1:
        inputs_TI = inputs_TI.contiguous()
    bias_O = None if bias is None else bias.to(torch.float32).contiguous()
    output_TO = inputs_TI.new_empty(len(inputs_TI), len(weight))
    scratch_TI = torch.empty(inputs_TI.shape, dtype=torch.float32)
    job = DenseJob(
        inputs_TI.data_ptr(), output_TO.data_ptr(), weight.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(), scratch_TI.data_ptr(), *output_TO.shape,
        weight.shape[1], inputs_TI.stride(0), torch.get_num_threads(),
        found.best if path == "auto" else PATHS.index(path),
    )  # fmt: skip
    found.handle.twofour_dense(ctypes.byref(job))
    return output_TO.view(*inputs.shape[:-1], len(weight))


@dense_linear.register_fake
def _(inputs: Tensor, weight: Tensor, bias: Tensor | None, path: str = "auto") -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
