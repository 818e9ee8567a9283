"""Packed 2:4 linear layers in PyTorch alone: the kernels' oracle, and what runs without them.

Shape suffixes: O rows, I columns, K survivors of a row, T tokens, G groups of scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.cpu.layout import ROWS, Prepared, restore
from sparsify.packed.layer import NF4

_TILE_WEIGHTS = 2**20  # of a dense tile: 4 MB, which stay in cache


def dense_weight(
    kind: str,
    num_columns: int,
    group_size: int,
    weight_OK: Tensor,
    indices: Tensor,
    scales_OG: Tensor | None = None,
    zeros_OG: Tensor | None = None,
) -> Tensor:
    """The dense float32 (O, I) weight that a packed file's tensors stand for (see `prepare`).

    Exact but for nf4, whose product of value and scale is rounded to float32.
    """
    bits = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    index_OK = (indices.unsqueeze(2) >> bits & 3).flatten(1)[:, : num_columns // 2].long()
    column_OK = index_OK + torch.arange(num_columns // 2).div(2, rounding_mode="floor") * 4
    if kind in ("int4", "nf4"):
        nibbles = torch.stack((weight_OK & 0x0F, weight_OK >> 4), dim=2)
        codes_OK = nibbles.flatten(1)[:, : num_columns // 2]
        values_OK = torch.tensor(NF4)[codes_OK.long()] if kind == "nf4" else codes_OK.float()
        if kind == "int4" and zeros_OG is None:
            values_OK -= 8
    else:
        values_OK = weight_OK.float()
    if scales_OG is not None:
        group_OK = column_OK.div(group_size, rounding_mode="floor") if scales_OG.shape[1] > 1 else (
            torch.zeros_like(column_OK)
        )  # fmt: skip
        if zeros_OG is not None:
            values_OK = values_OK - zeros_OG.float().gather(1, group_OK)
        values_OK = values_OK * scales_OG.float().gather(1, group_OK)
    return values_OK.new_zeros(len(weight_OK), num_columns).scatter_(1, column_OK, values_OK)


def linear(
    inputs_TI: Tensor,
    prepared: Prepared,
    bias_O: Tensor | None,
    kind: str,
    num_rows: int,
    group_size: int,
) -> Tensor:
    """The product (T, O) in float32, with some rows of the weight dense at a time (4 MB)."""
    num_columns = inputs_TI.shape[1]
    inputs_TI = inputs_TI.float()
    output_TO = inputs_TI.new_empty(len(inputs_TI), num_rows)
    step = max(1, _TILE_WEIGHTS // num_columns // ROWS)
    for block in range(0, -(-num_rows // ROWS), step):
        rows = slice(block * ROWS, min((block + step) * ROWS, num_rows))
        tile = Prepared(*(None if t is None else t[block : block + step] for t in prepared))  # type: ignore[arg-type]
        stored = restore(kind, rows.stop - rows.start, num_columns, tile)
        torch.matmul(
            inputs_TI,
            dense_weight(kind, num_columns, group_size, *stored).T,
            out=output_TO[:, rows],
        )
    return output_TO if bias_O is None else output_TO.add_(bias_O)
