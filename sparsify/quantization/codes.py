"""A quantised matrix: codes and scales as the packed format has them, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.packed.layer import NF4, Codes


@dataclass
class Quantized:
    """A quantised layer (or some rows of it); of a stack all tensors have a leading dimension."""

    codes: Codes
    """the code of a pruned weight is the one that means 0; a scale is 0 for a group whose kept
    weights are all 0, and may be of either sign where the levels are not symmetric"""
    weight_OI: Tensor
    """`dequantize` of them, in the dtype of the weight that was given"""


def dequantize(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The weight that codes and scales stand for, (O, I) in `dtype`; or a stack of them.

    One product in float32, exact for integers, and one rounding to `dtype`, as a packed folder is
    read: every machine gives the same bits. A level of 0 gives +0.0 at any scale.
    """
    size = codes.scheme.group_size or codes.values_OI.shape[-1]
    if codes.scheme.type == "nf4":
        levels_OI = torch.tensor(NF4, device=codes.values_OI.device)[codes.values_OI.int()]
    else:
        levels_OI = codes.values_OI.float()
    num_columns = levels_OI.shape[-1]
    if codes.zeros_OG is not None:
        levels_OI = levels_OI - per_column(codes.zeros_OG.float(), size, num_columns)
    scales_OI = per_column(codes.scales_OG.float(), size, num_columns)
    # -0.0 + 0.0 = +0.0: level 0 under a negative scale must not leave a sign bit behind.
    return (levels_OI * scales_OI + 0.0).to(dtype)


def per_column(part_OG: Tensor, group_size: int, num_columns: int) -> Tensor:
    """Each column's part, (O, I); or of each of a stack."""
    return part_OG.repeat_interleave(group_size, dim=-1)[..., :num_columns]
