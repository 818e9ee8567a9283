"""Sums of products of activations: X^T X and Y^T X over tokens.

Products are float32, or exact products of half precision summed in float32. What they are added to
is float64 on a CPU: there the order in which batches are added, and so the number of processes,
decides nothing but bits that rounding to float32 takes away again. On a GPU it is float32.

Shape suffixes: T tokens, I input features, L features of another tensor over the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels import _gram_triton
from sparsify.kernels.precision import float32_products

_HALF = (torch.float16, torch.bfloat16)

_NUM_PANELS = 8  # measured best of 2, 4, 8, 16 for 256 to 2816 columns on a CPU

_MIN_PANEL = 32  # narrower panels take longer than the half they save

_MIRROR_ROWS = 512  # bounds the memory of a transposed copy

_CROSS_ROWS = 4096  # bounds the memory of a product that waits to be added


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """Type of the sums on a device."""
    return torch.float64 if torch.device(device).type == "cpu" else torch.float32


def add_gram_(sum_II: Tensor, inputs_TI: Tensor) -> None:
    """Add X^T X to the upper triangle of `sum_II`; what is below the diagonal means nothing.

    `mirror_upper_` completes the sum once all tokens are in.

    Args:
        sum_II: float32 or float64 (I, I), contiguous; float32 for half precision on a GPU.
        inputs_TI: (T, I), any float dtype. Half precision is multiplied exactly: the product of
            two bfloat16 or float16 numbers fits float32, in which it is summed.

    Raises:
        InputError: half-precision inputs on a GPU, and Triton is not installed.

    Cost: T I^2 operations, half of the full product. Half precision on a GPU: one Triton kernel on
    tensor cores, over the tiles on and above the diagonal. All else: float32 products of eight
    panels of columns with what is on and right of them, 9/16 of the full product.
    """
    if inputs_TI.is_cuda and inputs_TI.dtype in _HALF:
        _gram_triton.add_upper_(sum_II, inputs_TI)
        return
    inputs_TI = inputs_TI.float()
    num_columns = inputs_TI.shape[1]
    width = max(-(-num_columns // _NUM_PANELS), _MIN_PANEL)
    with float32_products():
        for start in range(0, num_columns, width):
            panel = slice(start, start + width)
            _add_product_(sum_II[panel, start:], inputs_TI[:, panel], inputs_TI[:, start:])


def _add_product_(sum_LI: Tensor, left_TL: Tensor, right_TI: Tensor) -> None:
    if sum_LI.dtype == right_TI.dtype:
        sum_LI.addmm_(left_TL.T, right_TI)
    else:
        sum_LI += left_TL.T @ right_TI


def mirror_upper_(matrix_II: Tensor) -> Tensor:
    """Make a matrix symmetric by its upper triangle, in place.

    Cost: I^2 copies; memory for 512 rows.
    """
    for start in range(0, len(matrix_II), _MIRROR_ROWS):
        stop = start + _MIRROR_ROWS
        corner = matrix_II[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix_II[stop:, start:stop] = matrix_II[start:stop, stop:].T
    return matrix_II


def add_cross_(sum_LI: Tensor, left_TL: Tensor, inputs_TI: Tensor) -> None:
    """Add Y^T X to `sum_LI`.

    Args:
        sum_LI: float32 or float64 (L, I).
        left_TL: Y, (T, L), any float dtype.
        inputs_TI: X, (T, I), any float dtype. If both have the same half precision they are
            multiplied exactly and summed in float32, on a GPU by tensor cores.

    Cost: 2 T L I operations.
    """
    if inputs_TI.is_cuda and inputs_TI.dtype in _HALF and left_TL.dtype == inputs_TI.dtype:
        for start in range(0, len(sum_LI), _CROSS_ROWS):
            rows = slice(start, start + _CROSS_ROWS)
            sum_LI[rows] += torch.mm(left_TL[:, rows].T, inputs_TI, out_dtype=torch.float32)
        return
    left_TL, inputs_TI = left_TL.float(), inputs_TI.float()
    with float32_products():
        for start in range(0, len(sum_LI), _CROSS_ROWS):
            rows = slice(start, start + _CROSS_ROWS)
            _add_product_(sum_LI[rows], left_TL[:, rows], inputs_TI)
