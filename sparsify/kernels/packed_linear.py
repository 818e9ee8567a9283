"""y = x Wᵀ + b of a packed weight: the one function that packed layers call.

`twofour::packed_linear` is a torch custom op, so that torch.compile and CUDA graphs take it as it
is. What is here runs everywhere: it unpacks some rows at a time and multiplies. A kernel of a
device takes its place with `packed_linear.register_kernel("cpu")`, and may call `reference` for
what it does not know.

Shape suffixes: O output features (rows), I input features (columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.packed.layer import unpack_tiles
from sparsify.packed.layout import Layer, Scheme
from sparsify.pattern import Pattern

TILE_ELEMENTS = 2**20
"""of the dense weight that exist at one time"""


@torch.library.custom_op("twofour::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, weight: Tensor, indices: Tensor, scales: Tensor | None, zeros: Tensor | None,
    bias: Tensor | None, in_features: int, pattern: str, kind: str, bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    """A linear layer whose weight is packed.

    Args:
        x: (..., I), floating point.
        weight, indices, scales, zeros: tensors of a packed layer, as docs/formats.md has them.
        bias: (O,) or None.
        in_features: I.
        pattern: N:M.
        kind: type of the scheme: float, fp8, int or nf4.
        bits: of a code; 0 where there are none.
        group_size: columns of the dense row that share a scale; 0 where a row has one or none.

    Returns:
        (..., O) in the dtype of `x`. The weight is rounded to that dtype first, as it would be in
        the dense model; where it has more than `TILE_ELEMENTS`, sums may come in another order
        than in one product.

    Cost: of unpacking and of the dense product; memory for one tile.
    """
    return reference(
        x, weight, indices, scales, zeros, bias, in_features, pattern, kind, bits, group_size
    )


def reference(
    x: Tensor, weight: Tensor, indices: Tensor, scales: Tensor | None, zeros: Tensor | None,
    bias: Tensor | None, in_features: int, pattern: str, kind: str, bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    """`packed_linear` in plain PyTorch."""
    scheme = Scheme(kind, bits or None, group_size or None, symmetric=zeros is None)
    layer = Layer((weight.shape[0], in_features), scheme, Pattern.parse(pattern))
    given = {"weight_scales": scales, "weight_zeros": zeros}
    parts = {"weight": weight, "weight_indices": indices}
    parts |= {name: part for name, part in given.items() if part is not None}
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    for rows, tile_RI in unpack_tiles(layer, parts, x.dtype, TILE_ELEMENTS):
        own = None if bias is None else bias[rows]
        out[..., rows] = torch.nn.functional.linear(x, tile_RI, own)
    return out


@packed_linear.register_fake
def _(
    x: Tensor, weight: Tensor, indices: Tensor, scales: Tensor | None, zeros: Tensor | None,
    bias: Tensor | None, in_features: int, pattern: str, kind: str, bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[0])
