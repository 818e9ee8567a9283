"""A quantised matrix: integer codes, scales, their parameters, and the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.errors import InputError

METHODS = ("gptq", "rtn")


@dataclass
class QuantParams:
    """How to quantise."""

    method: str = "gptq"
    """gptq, or rtn (nearest code, no statistics)"""
    bits: int = 4
    """2 to 8"""
    group_size: int = 128
    """columns of a row that share a scale, pruned ones counted; the last group may be short"""
    damping: float = 0.01
    """share of the mean Hessian diagonal added to the diagonal"""
    block_size: int = 128
    """columns whose updates are gathered before they reach the columns to the right"""
    num_scale_steps: int = 32
    """scales of either sign that are tried per group"""
    num_refine_sweeps: int = 8
    """at most this many sweeps of coordinate descent after gptq; 0 gives plain gptq"""
    teacher_share: float = 0.5
    """how far gptq's target moves towards the outputs of the unquantised model, 0 to 1"""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(
                f"quantize.method={self.method!r}: no such method; use {' or '.join(METHODS)}"
            )
        limits: dict[str, tuple[int, int | None]] = {
            "bits": (2, 8), "group_size": (1, None), "block_size": (1, None),
            "num_scale_steps": (1, None), "num_refine_sweeps": (0, None), "teacher_share": (0, 1),
        }  # fmt: skip
        for name, (lowest, highest) in limits.items():
            value = getattr(self, name)
            if not (lowest <= value and (highest is None or value <= highest)):
                rule = f"at least {lowest}" + (f" and at most {highest}" if highest else "")
                raise InputError(f"quantize.{name}={value}: must be {rule}")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise InputError(f"quantize.damping={self.damping}: must be a finite number, 0 or more")

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code, both included."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


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
