"""A quantised matrix: integer codes, scales, their parameters, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Quantized:
    """A quantised layer (or some rows of it)."""

    codes_OI: Tensor
    """int8, 0 wherever the keep mask is False"""
    scales_OG: Tensor
    """float16, of either sign; 0 for a group whose codes are all 0 because its weights are"""
    weight_OI: Tensor
    """`dequantize` of the two, in the dtype of the weight that was given"""
    group_size: int
    bits: int
    damping: float | None = None
    """damping that was used; None for rtn"""


def dequantize(codes_OI: Tensor, scales_OG: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight that codes and scales stand for, (O, I) in `dtype`.

    The product of an 8-bit code and a float16 scale is exact in float32, so the only rounding is
    the one to `dtype`, and every machine gives the same bits. Code 0 gives +0.0 at any scale.
    """
    scales_OI = _per_column(scales_OG.float(), group_size, codes_OI.shape[1])
    # -0.0 + 0.0 = +0.0: code 0 under a negative scale must not leave a sign bit behind.
    return (codes_OI.float() * scales_OI + 0.0).to(dtype)


def _per_column(scales_OG: Tensor, group_size: int, num_columns: int) -> Tensor:
    """Each column's scale, (O, I)."""
    return scales_OG.repeat_interleave(group_size, dim=1)[:, :num_columns]
