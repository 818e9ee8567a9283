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
    parts_OP, width = values_OK.to(torch.uint8), bits
    if 8 % bits:  # numbers lie across bytes: bit by bit
        places = torch.arange(bits, dtype=torch.uint8, device=parts_OP.device)
        parts_OP, width = ((parts_OP[:, :, None] >> places) & 1).flatten(1), 1
    per_byte = 8 // width
    parts_OP = torch.nn.functional.pad(parts_OP, (0, -parts_OP.shape[1] % per_byte))
    parts_OBP = parts_OP.reshape(len(values_OK), parts_OP.shape[1] // per_byte, per_byte)
    packed_OB = parts_OBP[:, :, 0].clone()
    for place in range(1, per_byte):
        packed_OB |= parts_OBP[:, :, place] << (place * width)
    return packed_OB


def unpack_bits(packed_OB: Tensor, bits: int, num_values: int) -> Tensor:
    """The first `num_values` numbers of each row that `pack_bits` wrote, uint8 (O, num_values)."""
    width = 1 if 8 % bits else bits
    places = torch.arange(0, 8, width, dtype=torch.uint8, device=packed_OB.device)
    parts_OP = ((packed_OB[:, :, None] >> places) & (2**width - 1)).flatten(1)
    if width == bits:
        return parts_OP[:, :num_values]
    values_OKb = parts_OP[:, : num_values * bits].reshape(len(packed_OB), num_values, bits)
    places = torch.arange(bits, dtype=torch.uint8, device=packed_OB.device)
    return (values_OKb << places).sum(-1, dtype=torch.uint8)
