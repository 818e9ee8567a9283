"""A packed layer's codes as a dense matrix, for formats that know nothing of positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.masks.bits import unpack_bits
from sparsify.packed.layer import NF4, Codes, keep_mask_of
from sparsify.packed.layout import Layer


def unpack_codes(layer: Layer, parts: Mapping[str, Tensor]) -> Codes:
    """What `pack_layer` was given, with the code of exactly 0 at pruned places.

    Args:
        layer: one that has codes.
        parts: its tensors, by the last part of their names.

    Returns:
        Codes (O, I), scales (O, G), and zeros (O, G) of an asymmetric scheme.

    Raises:
        InputError: the layer stores values.

    Cost: the mask and the codes of the whole layer, 10 bytes for each survivor.
    """
    scheme = layer.scheme
    if not scheme.has_codes:
        raise InputError(f"scheme {scheme.name}: values are stored, there are no codes")
    keep_OI = keep_mask_of(layer, parts)
    stored = parts["weight"]
    if scheme.bits == 4:
        if layer.pattern.is_structured:
            stored = unpack_bits(stored, 4, layer.num_kept)
        else:
            stored = unpack_bits(stored[None], 4, int(keep_OI.sum()))[0]
        if scheme.type == "int" and scheme.symmetric:
            stored = (stored.to(torch.int8)) - 8
    zeros_OG = parts.get("weight_zeros")
    if zeros_OG is not None:
        size = scheme.group_size or layer.shape[1]
        dense_OI = zeros_OG.repeat_interleave(size, dim=1)[:, : layer.shape[1]].clone()
    else:
        dense_OI = torch.zeros(layer.shape, dtype=stored.dtype)
        if scheme.type == "nf4":
            dense_OI.fill_(NF4.index(0.0))
    as_bytes = dense_OI.view(torch.uint8)  # masked assignment is not there for float8
    as_bytes[keep_OI] = stored.reshape(-1).contiguous().view(torch.uint8)
    return Codes(dense_OI, parts["weight_scales"], scheme, zeros_OG)
