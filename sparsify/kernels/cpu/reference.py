"""Packed 2:4 linear layers in PyTorch alone: what runs where the kernels do not.

Shape suffixes: O rows (R some of them), I columns, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.kernels.cpu.layout import ROWS, WITH_GROUPS, Prepared, restore
from sparsify.packed.layer import unpack_layer
from sparsify.packed.layout import Layer, Scheme
from sparsify.pattern import Pattern

_PARTS = ("weight", "weight_indices", "weight_scales", "weight_zeros")  # as `restore` gives them

_PATTERN = Pattern.parse("2:4")

_TILE_WEIGHTS = 2**20  # of a dense tile: 4 MB, which stay in cache


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
    scheme = _scheme(kind, prepared, num_columns, group_size)
    inputs_TI = inputs_TI.float()
    output_TO = inputs_TI.new_empty(len(inputs_TI), num_rows)
    step = max(1, _TILE_WEIGHTS // num_columns // ROWS)
    for block in range(0, -(-num_rows // ROWS), step):
        rows = slice(block * ROWS, min((block + step) * ROWS, num_rows))
        tile = Prepared(*(None if t is None else t[block : block + step] for t in prepared))  # type: ignore[arg-type]
        stored = restore(kind, rows.stop - rows.start, num_columns, tile)
        parts = {name: part for name, part in zip(_PARTS, stored, strict=True) if part is not None}
        layer = Layer((rows.stop - rows.start, num_columns), scheme, _PATTERN)
        weight_RI = unpack_layer(layer, parts, torch.float32)
        torch.matmul(inputs_TI, weight_RI.T, out=output_TO[:, rows])
    return output_TO if bias_O is None else output_TO.add_(bias_O)


def _scheme(kind: str, prepared: Prepared, num_columns: int, group_size: int) -> Scheme:
    """What packed files call the kind."""
    if kind == "float8":
        return Scheme("fp8")
    if kind not in WITH_GROUPS:
        return Scheme()
    scales = prepared.scales_BG8
    size = group_size if scales is not None and scales.shape[1] > 1 else num_columns
    if kind == "nf4":
        return Scheme("nf4", 4, size)
    return Scheme("int", int(kind.removeprefix("int")), size, prepared.zeros_BG8 is None)
