"""Rows of small integers as rows of bytes.

Shape suffixes: O rows, K numbers of a row, B bytes (or bits) of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_bytes(num_values: int, bits: int) -> int:
    """Bytes that a row of `num_values` numbers of `bits` bits takes."""
    return -(-num_values * bits // 8)


def pack_bits(values_OK: Tensor, bits: int) -> Tensor:
    """Write each row's numbers (0 to 2^bits - 1) one after another, from the lowest bit up.

    Args:
        values_OK: integer or bool (O, K).
        bits: of each number, 1 to 8.

    Returns:
        uint8 (O, ceil(K bits / 8)); unused bits at the end of a row are 0.

    Raises:
        ValueError: a number needs more bits.
    """
    if values_OK.numel() and not 0 <= int(values_OK.min()) <= int(values_OK.max()) < 2**bits:
        raise ValueError(f"a number outside 0 to {2**bits - 1} does not fit {bits} bits")
    places = torch.arange(bits, dtype=torch.uint8)
    spread_OB = ((values_OK.to(torch.uint8)[:, :, None] >> places) & 1).flatten(1)
    padded_OB = torch.nn.functional.pad(spread_OB, (0, -spread_OB.shape[1] % 8))
    packed_O8 = padded_OB.reshape(len(values_OK), padded_OB.shape[1] // 8, 8)
    packed_O8 = packed_O8 << torch.arange(8, dtype=torch.uint8)
    return packed_O8.sum(-1, dtype=torch.uint8)


def unpack_bits(packed_OB: Tensor, bits: int, num_values: int) -> Tensor:
    """The first `num_values` numbers of each row that `pack_bits` wrote, uint8 (O, num_values)."""
    places = torch.arange(8, dtype=torch.uint8)
    spread_OB = ((packed_OB[:, :, None] >> places) & 1).flatten(1)[:, : num_values * bits]
    values_OKb = spread_OB.reshape(len(packed_OB), num_values, bits)
    return (values_OKb << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
