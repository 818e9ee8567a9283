"""Few tokens by a packed 2:4 weight: one product on the sparse tensor cores, no dense weight.

A warp takes some tiles of 16 rows and some of the steps of 256 columns, as `plan_of` shares them
out; warps of the same rows add up at the end, always in the same order. Of its next steps a lane
first reads all words, 16 bytes at a time, and then computes tile after tile: survivors become
bfloat16 (or float16) in registers, the inputs come from the cache, `mma.sp` multiplies. Scales are
applied to the float32 sums of each group, so that no weight is rounded but NF4's table. More than a
few tokens are brought into the order of lanes first, by a small launch before.

Shape suffixes: O rows, I columns, T tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels.cuda._decode_triton import arrange_kernel, decode_kernel
from sparsify.kernels.cuda.layout import COLUMNS, Prepared, scale_width
from sparsify.kernels.cuda.ptx import sparse_product_ptx
from sparsify.kernels.triton_jit import require_triton

MOST_TOKENS = 64
"""of one launch"""

_ARRANGED_WORDS = 512  # of a program of `arranged`


def decode(
    inputs_TI: Tensor,
    prepared: Prepared,
    bias_O: Tensor | None,
    kind: str,
    num_rows: int,
    group_size: int,
    out_dtype: torch.dtype | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """x W^T + bias, (T, O), for at most 64 tokens.

    Args:
        inputs_TI: bfloat16 or float16, of the weight's dtype if that is one of them.
        prepared: of `layout.prepare`.
        bias_O: any float type, or None.
        kind: one of `layout.KINDS`.
        num_rows: O.
        group_size: columns that share a scale; 0 where a row has one or none.
        out_dtype: of the result; None for that of the inputs.
        plan: how to share it out; None for `plan_of`'s.

    Raises:
        InputError: Triton is not installed.

    Cost: one launch, or two (`Plan.is_arranged`). Reads the packed weight once, and each program
    all inputs, from the cache.
    """
    require_triton()
    num_tokens, num_columns = inputs_TI.shape
    output_TO = inputs_TI.new_empty(num_tokens, num_rows, dtype=out_dtype or inputs_TI.dtype)
    inputs_TI = inputs_TI.contiguous()
    if inputs_TI.data_ptr() % 4:
        inputs_TI = inputs_TI.clone()
    values, positions, scales, zeros = prepared
    width = scale_width(num_columns, group_size, zeros is not None) if scales is not None else 0
    is_half = inputs_TI.dtype == torch.float16
    num_steps = values.shape[1]
    plan = plan or plan_of(num_tokens, len(values), num_steps, kind)
    unused = values  # in place of a pointer that is not read
    with torch.cuda.device_of(inputs_TI):
        words = inputs_TI.view(torch.int32)
        if plan.is_arranged:
            words = arranged(words, num_steps)
        # Not seen on a GPU behind the launch that arranges.
        overlaps = not plan.is_arranged and may_overlap(inputs_TI.device)
        decode_kernel[(len(values) // (plan.row_tiles * plan.row_warps),)](
            words, values, positions, unused if scales is None else scales,
            unused if zeros is None else zeros, unused if bias_O is None else bias_O, output_TO,
            num_tokens, num_rows, num_columns, num_steps, KIND=kind, IS_HALF=is_half,
            WIDTH=width, HAS_ROW_SCALES=scales is not None and not width,
            HAS_ZEROS=zeros is not None, HAS_BIAS=bias_O is not None,
            CUTS_COLUMNS=num_columns % COLUMNS != 0,
            CUTS_STEPS=num_steps % (plan.step_warps * plan.unrolled_steps) != 0,
            N=plan.token_tiles, R=plan.row_tiles, ROW_WARPS=plan.row_warps,
            STEP_WARPS=plan.step_warps, U=plan.unrolled_steps, IS_ARRANGED=plan.is_arranged,
            OVERLAPS=overlaps, FIRST=sparse_product_ptx(0, is_half),
            SECOND=sparse_product_ptx(1, is_half), num_warps=plan.row_warps * plan.step_warps,
            **({"launch_pdl": True} if overlaps else {}),
        )  # fmt: skip
    return output_TO


@lru_cache
def may_overlap(device: torch.device) -> bool:
    """Whether a launch may begin to read its weight while the one before it ends.

    Hopper and later have it (programmatic dependent launch). A weight must then have been there
    before the launch that comes before: whoever prepares one waits for it (`kernels.orders`).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def arranged(words_TI: Tensor, num_steps: int) -> Tensor:
    """Inputs, two a word, so that a lane reads 16 bytes at a time: (T, 128 steps) int32."""
    num_tokens, num_words = len(words_TI), 128 * num_steps
    output = words_TI.new_empty(num_tokens, num_words)
    grid = (num_tokens, -(-num_words // _ARRANGED_WORDS))
    arrange_kernel[grid](words_TI, output, 2 * words_TI.shape[1], num_words, BLOCK=_ARRANGED_WORDS)
    return output


class Plan(NamedTuple):
    """How a product is shared out."""

    token_tiles: int
    """of 8 tokens; a power of two"""
    row_tiles: int
    """of 16 rows, of a warp"""
    row_warps: int
    """of a program, each with row tiles of its own"""
    step_warps: int
    """of a program, which share the steps of the same row tiles"""
    unrolled_steps: int
    """of a warp, whose words are on their way at the same time"""
    is_arranged: bool
    """inputs are brought into the order of lanes first, by a launch of its own"""


# Least row tiles -> row tiles of a warp, row warps, step warps, steps at once. Each is the fastest,
# or within 11 % of it, of 20 to 40 that were timed on an H200 at shapes of Llama 3.1 8B and 70B,
# weights in memory and not in a cache, in graphs (docs/kernels.md). "wide" values have 16 bits.
_SHARES: dict[tuple[str, int], dict[int, tuple[int, int, int, int]]] = {
    ("wide", 1): {0: (1, 1, 8, 2), 128: (1, 2, 4, 2), 512: (1, 2, 2, 2)},
    ("narrow", 1): {0: (1, 1, 4, 4), 512: (1, 1, 4, 1), 1536: (2, 2, 2, 1)},
    ("wide", 8): {0: (1, 1, 4, 2), 128: (1, 1, 4, 1), 512: (1, 4, 2, 2)},
    ("narrow", 8): {0: (1, 1, 8, 2), 128: (1, 1, 4, 1), 1536: (1, 2, 2, 1)},
    ("wide", 16): {0: (1, 1, 4, 2), 512: (2, 1, 2, 1)},
    ("narrow", 16): {0: (1, 1, 4, 2), 128: (2, 2, 4, 2), 512: (2, 2, 2, 2), 1536: (4, 1, 2, 1)},
    ("wide", 64): {0: (1, 4, 2, 1)},
    ("narrow", 64): {0: (1, 4, 2, 1)},
}

_FEW_TILES = 128  # below, the launch that arranges the inputs costs more than it saves

_FEW_TOKENS = 4  # the same


def plan_of(num_tokens: int, num_row_tiles: int, num_steps: int, kind: str) -> Plan:
    """How to share out a product.

    Args:
        num_tokens: at most 64.
        num_row_tiles: of the weight, 16 rows each.
        num_steps: of the weight, 256 columns each.
        kind: of its values.
    """
    width = "wide" if kind in ("bfloat16", "float16") else "narrow"
    most = min(most for name, most in _SHARES if name == width and most >= num_tokens)
    shares = _SHARES[width, most]
    row_tiles, row_warps, step_warps, steps = shares[max(n for n in shares if n <= num_row_tiles)]
    while num_row_tiles % (row_tiles * row_warps):
        row_tiles, row_warps = (row_tiles, row_warps // 2) if row_warps > 1 else (row_tiles // 2, 1)
    if num_steps > step_warps * steps and num_steps % (step_warps * steps):
        step_warps, steps = min(8, 2 * step_warps), 1  # a cut turn costs more than it hides
    while step_warps * steps > 1 and step_warps * steps // 2 >= num_steps:
        step_warps, steps = (step_warps, steps // 2) if steps > 1 else (step_warps // 2, 1)
    token_tiles = 1
    while 8 * token_tiles < num_tokens:
        token_tiles *= 2
    is_arranged = token_tiles > 1 or (num_tokens >= _FEW_TOKENS and num_row_tiles >= _FEW_TILES)
    return Plan(token_tiles, row_tiles, row_warps, step_warps, steps, is_arranged)
