"""One layer: a weight and its keep mask to packed tensors, and back.

Shape suffixes: O output features (rows; R some of them), I input features (columns), K survivors of
a row, N survivors of a layer, G groups of columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.errors import InputError, PatternViolationError
from sparsify.masks.bits import pack_bits, unpack_bits
from sparsify.masks.select import find_violation
from sparsify.packed.layout import FLOATS, Layer, Scheme, index_bits, part_bytes
from sparsify.pattern import Pattern, check_divides

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# QLoRA's sixteen values (arXiv:2305.14314, appendix E): quantiles of a normal distribution, scaled
# to 1. Code 7 is zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

_TILE_ELEMENTS = 2**20
"""of a dense weight that are unpacked at one time"""


@dataclass(frozen=True)
class Codes:
    """A quantised weight as its quantiser has it: dense, with anything at pruned places."""

    values_OI: Tensor
    """int: int8 (symmetric) or uint8; nf4: uint8 places in `NF4`; fp8: float8_e4m3fn"""
    scales_OG: Tensor
    """int, nf4: float16; fp8: float32 (O, 1)"""
    scheme: Scheme
    zeros_OG: Tensor | None = None
    """uint8, of an asymmetric scheme"""


def layer_of(name: str, weight_OI: Tensor, pattern: Pattern, codes: Codes | None = None) -> Layer:
    """What a weight is stored as; its values do not count.

    Raises:
        InputError: no matrix of a type that can be packed, or the pattern does not divide it.
    """
    dtype = DTYPE_NAMES.get(weight_OI.dtype)
    if weight_OI.ndim != 2 or dtype not in FLOATS:
        raise InputError(
            f"{name}: {tuple(weight_OI.shape)} of {str(weight_OI.dtype).removeprefix('torch.')} "
            "cannot be packed; a matrix of float32, bfloat16 or float16 can"
        )
    num_rows, num_columns = weight_OI.shape
    check_divides(name, num_columns, pattern)
    return Layer((num_rows, num_columns), codes.scheme if codes else Scheme(), pattern)


def packed_num_bytes(
    tensors: Mapping[str, Tensor], layers: Collection[str], pattern: Pattern,
    scheme: Scheme | None = None,
) -> int:  # fmt: skip
    """Size of the tensors of a packed model, without packing; files add headers and the index.

    Args:
        tensors: those that a dense folder stores, tied ones once; values do not count.
        layers: those to be packed.
        pattern: of those; unstructured ones are counted with what the pattern keeps.
        scheme: of those; None: their values.

    Raises:
        InputError: a layer is missing, or the pattern does not divide it.
    """
    total = 0
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") not in layers:
            total += tensor.numel() * tensor.element_size()
    for name in layers:
        if f"{name}.weight" not in tensors:
            raise InputError(f"pack: {name}.weight is not a tensor of the model")
        plain = layer_of(name, tensors[f"{name}.weight"], pattern)
        layer = Layer(plain.shape, scheme or Scheme(), pattern)
        kept = plain.shape[0] * pattern.num_kept(plain.shape[1])
        own = DTYPE_NAMES[tensors[f"{name}.weight"].dtype]
        total += sum(part_bytes(*part) for part in layer.parts(own, kept).values())
    return total


def pack_layer(
    name: str, weight_OI: Tensor, keep_OI: Tensor, pattern: Pattern, codes: Codes | None = None
) -> tuple[Layer, dict[str, Tensor]]:
    """The tensors that a layer is stored as, by the last part of their names.

    Args:
        name: of the layer, for messages.
        weight_OI: float32, bfloat16 or float16, zero wherever the mask is False.
        keep_OI: bool (O, I), True = survives: exactly n of every m.
        pattern: of the mask.
        codes: what the weight was rounded to; None stores its values.

    Returns:
        What is stored, and the tensors on the CPU. A pruned -0.0 comes back as 0.0, everything else
        to the bit.

    Raises:
        PatternViolationError: a pruned weight is not zero, or a group is too full.
        InputError: weight, mask and codes do not belong together.

    Cost: some rows at a time; 8 bytes for each survivor of those.
    """
    weight_OI, keep_OI = weight_OI.detach().cpu(), keep_OI.cpu()
    layer = layer_of(name, weight_OI, pattern, codes)
    _check_mask(name, weight_OI, keep_OI, pattern)
    if codes is not None:
        _check_codes(name, layer, codes)
    values_OI = weight_OI if codes is None else codes.values_OI.cpu()
    as_bits = values_OI.view(torch.uint8) if values_OI.element_size() == 1 else values_OI
    kept = as_bits[keep_OI].view(values_OI.dtype)
    num_rows, num_columns = layer.shape
    kept = kept.view(num_rows, layer.num_kept) if pattern.is_structured else kept
    if layer.scheme.bits == 4:
        kept = kept.short() + (8 if layer.scheme.type == "int" and layer.scheme.symmetric else 0)
        kept = _nibbles(kept)
    parts = {"weight": kept.contiguous()}
    if pattern.is_structured:
        columns_OI = torch.arange(num_columns).remainder(pattern.m).to(torch.uint8)
        indices_OK = columns_OI.expand(layer.shape)[keep_OI].view(num_rows, layer.num_kept)
        parts["weight_indices"] = pack_bits(indices_OK, index_bits(pattern))
    else:
        parts["weight_bitmask"] = pack_bits(keep_OI, 1)
    if codes is not None:
        parts["weight_scales"] = codes.scales_OG.cpu().contiguous()
        if codes.zeros_OG is not None:
            parts["weight_zeros"] = codes.zeros_OG.cpu().contiguous()
        _check_meaning(name, layer, parts, weight_OI)
    return layer, parts


def unpack_layer(layer: Layer, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The dense weight (O, I) in `dtype`, on the device of the parts.

    Codes times scales are exact in float32, so that the only rounding is the one to `dtype`, and
    every machine gives the same bits. A pruned weight is +0.0, and so is code 0 at any scale.
    """
    device = parts["weight"].device
    weight_OI = torch.empty(layer.shape, dtype=dtype, device=device)
    for rows, tile_RI in unpack_tiles(layer, parts, dtype):
        weight_OI[rows] = tile_RI
    return weight_OI


def unpack_tiles(
    layer: Layer, parts: Mapping[str, Tensor], dtype: torch.dtype, elements: int = _TILE_ELEMENTS
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their dense weights in `dtype`), about so many elements at a time.

    Cost: at most 32 bytes for each element of a tile.
    """
    num_rows, num_columns = layer.shape
    step = max(1, elements // num_columns)
    start_N = 0
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        tile = {name: part[rows] for name, part in parts.items()}
        if layer.pattern.is_structured:
            yield rows, _unpack_rows(layer, tile, dtype)
            continue
        keep_RI = unpack_bits(tile["weight_bitmask"], 1, num_columns).bool()
        end_N = start_N + int(keep_RI.sum())
        yield rows, _unpack_uneven(layer, tile, keep_RI, parts["weight"], start_N, dtype)
        start_N = end_N


def keep_mask_of(layer: Layer, parts: Mapping[str, Tensor]) -> Tensor:
    """The keep mask (O, I) that the positions say.

    Raises:
        InputError: a column outside its group, or positions of a group that do not rise.
    """
    num_columns = layer.shape[1]
    if not layer.pattern.is_structured:
        return unpack_bits(parts["weight_bitmask"], 1, num_columns).bool()
    n, m = layer.pattern.n, layer.pattern.m
    indices_OK = unpack_bits(parts["weight_indices"], index_bits(layer.pattern), layer.num_kept)
    indices_OGN = indices_OK.view(len(indices_OK), -1, n)
    is_wrong_OG = (indices_OGN >= m).any(-1)
    if n > 1:
        is_wrong_OG |= (indices_OGN[..., 1:] <= indices_OGN[..., :-1]).any(-1)
    if bool(is_wrong_OG.any()):
        row, group = is_wrong_OG.nonzero()[0].tolist()
        raise InputError(
            f"row {row}, group {group}: its positions are "
            f"{indices_OGN[row, group].tolist()}, not {n} different columns of {m} in order"
        )
    keep_OI = torch.zeros(layer.shape, dtype=torch.bool, device=indices_OK.device)
    return keep_OI.scatter_(1, _columns(layer, parts["weight_indices"]), True)


def _columns(layer: Layer, indices: Tensor) -> Tensor:
    """int64 (R, K): the column of each survivor."""
    pattern = layer.pattern
    indices_RK = unpack_bits(indices, index_bits(pattern), layer.num_kept)
    starts_K = torch.arange(layer.num_kept, device=indices.device) // pattern.n * pattern.m
    return indices_RK + starts_K


def _unpack_rows(layer: Layer, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Some rows of an N:M layer."""
    columns_RK = _columns(layer, parts["weight_indices"])
    stored = parts["weight"]
    if layer.scheme.bits == 4:
        stored = unpack_bits(stored, 4, layer.num_kept)
    size = layer.scheme.group_size
    groups_RK = None if size is None else columns_RK // size
    values_RK = _meant(layer.scheme, stored, parts, groups_RK).to(dtype)
    weight_RI = values_RK.new_zeros(len(columns_RK), layer.shape[1])
    return weight_RI.scatter_(1, columns_RK, values_RK)


def _unpack_uneven(
    layer: Layer, parts: Mapping[str, Tensor], keep_RI: Tensor, stored: Tensor, start: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Some rows of an unstructured layer, whose survivors begin at place `start`."""
    num = int(keep_RI.sum())
    if layer.scheme.bits == 4:
        nibbles = unpack_bits(stored[None, start // 2 : -(-(start + num) // 2)], 4, num + start % 2)
        stored = nibbles[0, start % 2 :]
    else:
        stored = stored[start : start + num]
    rows_N, columns_N = keep_RI.nonzero(as_tuple=True)
    scheme = layer.scheme
    flat = {name: parts[name] for name in ("weight_scales", "weight_zeros") if name in parts}
    place_N = rows_N * layer.num_groups
    if scheme.group_size is not None:
        place_N = place_N + columns_N // scheme.group_size
    flat = {name: part.reshape(1, -1) for name, part in flat.items()}
    values_N = _meant(scheme, stored[None], flat, place_N[None] if flat else None)[0]
    weight_RI = torch.zeros(keep_RI.shape, dtype=dtype, device=keep_RI.device)
    weight_RI[keep_RI] = values_N.to(dtype)
    return weight_RI


def _meant(
    scheme: Scheme, stored_RK: Tensor, parts: Mapping[str, Tensor], places_RK: Tensor | None
) -> Tensor:
    """The weights that are stored, (R, K): as they are, or float32 of codes and scales.

    Args:
        stored_RK: values, or codes one an element.
        parts: with the scales (and zeros) of the same rows.
        places_RK: which scale of its row each takes; None where a row has one.
    """
    if scheme.type == "float":
        return stored_RK

    def spread(part_RG: Tensor) -> Tensor:
        return part_RG.float() if places_RK is None else part_RG.float().gather(1, places_RK)

    if scheme.type == "nf4":
        table = torch.tensor(NF4, dtype=torch.float32, device=stored_RK.device)
        codes_RK = table[stored_RK.int()]
    else:
        codes_RK = stored_RK.float()
    if scheme.type == "int" and not scheme.symmetric:
        codes_RK = codes_RK - spread(parts["weight_zeros"])
    elif scheme.bits == 4 and scheme.type == "int":
        codes_RK = codes_RK - 8
    # -0.0 + 0.0 = +0.0: code 0 under a negative scale must not leave a sign bit behind.
    return codes_RK * spread(parts["weight_scales"]) + 0.0


def _nibbles(kept: Tensor) -> Tensor:
    """Two codes a byte, the first in the low half; rows, or all of it, start on a byte."""
    return pack_bits(kept, 4) if kept.ndim == 2 else pack_bits(kept[None], 4)[0]


def _check_mask(name: str, weight_OI: Tensor, keep_OI: Tensor, pattern: Pattern) -> None:
    if keep_OI.dtype != torch.bool or keep_OI.shape != weight_OI.shape:
        raise InputError(
            f"{name}: keep mask {tuple(keep_OI.shape)} of {keep_OI.dtype} for a weight of "
            f"{tuple(weight_OI.shape)}; masks and model are of different runs"
        )
    require_packable(name, weight_OI, pattern)
    if bool(((weight_OI != 0) & ~keep_OI).any()):
        row, column = ((weight_OI != 0) & ~keep_OI).nonzero()[0].tolist()
        where = f", group {column // pattern.m}" if pattern.is_structured else ""
        raise PatternViolationError(
            f"{name}: the pruned weight at row {row}{where}, column {column} is not 0; apply the "
            "masks"
        )
    num_rows, num_columns = weight_OI.shape
    width = pattern.m or num_columns
    quota = pattern.num_kept(width)
    counts_OG = keep_OI.view(num_rows, num_columns // width, width).sum(-1)
    if pattern.is_structured or find_violation(keep_OI, pattern) is not None:
        wrong_OG = counts_OG != quota
        if bool(wrong_OG.any()):
            row, group = wrong_OG.nonzero()[0].tolist()
            raise InputError(
                f"{name}: the mask keeps {int(counts_OG[row, group])} of the {width} weights from "
                f"row {row}, column {group * width}, but {pattern} keeps {quota}; it is another "
                "pattern's"
            )


def require_packable(name: str, weight_OI: Tensor, pattern: Pattern) -> None:
    """PatternViolationError with row and group where a group holds more than the pattern keeps."""
    place = find_violation(weight_OI, pattern) if pattern.is_structured else None
    if place is not None:
        row, column = place
        group = weight_OI[row, column : column + pattern.m]
        raise PatternViolationError(
            f"{name}: row {row}, group {column // pattern.m} (columns {column} to "
            f"{column + pattern.m - 1}) holds {int(group.count_nonzero())} nonzero weights where "
            f"{pattern} keeps {pattern.n}; prune this model first, or leave the layer out"
        )


def _check_codes(name: str, layer: Layer, codes: Codes) -> None:
    """InputError unless codes, scales and zeros have the types and shapes that the scheme says."""
    is_signed = codes.scheme.type == "int" and codes.scheme.symmetric
    dtype = "I8" if is_signed else _part(layer, "weight")[0]
    given = {
        "codes": (codes.values_OI, dtype, layer.shape),
        "scales": (codes.scales_OG, *_part(layer, "weight_scales")),
    }
    if codes.scheme.symmetric != (codes.zeros_OG is None):
        raise InputError(f"{name}: zeros belong to asymmetric codes, and to no others")
    if codes.zeros_OG is not None:
        given["zeros"] = (codes.zeros_OG, *_part(layer, "weight_zeros"))
    for what, (tensor, kind, shape) in given.items():
        if tensor.dtype != DTYPES[kind] or tuple(tensor.shape) != shape:
            raise InputError(
                f"{name}: {what} are {tuple(tensor.shape)} of {tensor.dtype}; {codes.scheme.name} "
                f"has {shape} of {DTYPES[kind]}"
            )


def _part(layer: Layer, name: str) -> tuple[str, tuple[int, ...]]:
    return layer.parts(num_survivors=0)[name]


def _check_meaning(name: str, layer: Layer, parts: Mapping[str, Tensor], weight_OI: Tensor) -> None:
    """InputError unless the parts stand for the weight."""
    for rows, tile_RI in unpack_tiles(layer, parts, weight_OI.dtype):
        if not torch.equal(tile_RI, weight_OI[rows]):
            raise InputError(
                f"{name}: the weight is not what its codes and scales stand for; it was changed "
                "after quantisation, quantise it again"
            )
