"""The packed file of a pruned model: only surviving weights are stored, with their positions.

One safetensors file; equal models give equal bytes. Its metadata has the single key
"twofour-packed" (several keys would be written in no fixed order), whose value is JSON:

    version  "1"
    pattern  the pattern's text, such as "2:4"
    layers   layer name -> {"shape": [O, I], "dtype": "float32", "bits": 4, "group_size": 128};
             bits and group_size are null for a layer stored as values
    aliases  name -> name of the stored tensor that it is tied to
    sha256   over all of the above and the tensors

A layer `L` (the state dict's `L.weight`) becomes the following tensors, where K is the number of
weights that survive in a row; every other tensor is stored as it is, under its own name.

    L.weight.values   (O, K) in the layer's dtype: surviving weights from left to right; where rows
                      of an unstructured pattern keep unlike numbers, K is the most ("num_kept" of
                      the layer says it), and shorter rows end in zeros
    L.weight.codes    instead of values: their codes, each as code + 2^(bits-1) in `bits` bits
    L.weight.scales   with codes: float16 (O, ceil(I / group_size)); weight = code * scale
    L.weight.indices  n:m: each survivor's column within its group of m, in ceil(log2 m) bits
    L.weight.bitmask  unstructured: one bit per weight, 1 = survives

Codes, indices and bitmask are uint8 (O, bytes): small numbers one after another from the lowest
bit up, every row starting on a byte. A group always has n slots, even where surviving weights are
0.0: the keep mask says what survives, not the values.

Shape suffixes: O output features (rows), I input features (columns), K survivors of a row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify.errors import InputError, PatternViolationError
from sparsify.masks.bits import num_bytes, pack_bits, unpack_bits
from sparsify.masks.select import find_violation
from sparsify.pattern import Pattern, check_divides
from sparsify.quantization.codes import Quantized, dequantize
from sparsify.tensors import tensor_names, tied_names, without_aliases

FORMAT = "twofour-packed"

VERSION = "1"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_EXPORT_AGAIN = "export the model again"


@dataclass(frozen=True)
class _LayerSpec:
    """What the file says about one pruned layer."""

    shape: tuple[int, int]
    dtype: str
    bits: int | None = None
    group_size: int | None = None
    num_kept: int | None = None
    """the most survivors of a row, where rows keep unlike numbers"""

    def entry(self) -> dict[str, Any]:
        """For the header."""
        entry = asdict(self)
        if self.num_kept is None:
            del entry["num_kept"]
        return entry

    def most_kept(self, pattern: Pattern) -> int:
        """Survivors of the fullest row."""
        return pattern.num_kept(self.shape[1]) if self.num_kept is None else self.num_kept

    def layout(self, pattern: Pattern) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        """Dtype and shape of every tensor the layer is stored as, by the last part of its name."""
        num_rows, num_columns = self.shape
        num_kept = self.most_kept(pattern)
        stored: dict[str, tuple[torch.dtype, tuple[int, int]]] = {}
        if self.bits is None or self.group_size is None:
            stored["values"] = (_DTYPES[self.dtype], (num_rows, num_kept))
        else:
            stored["codes"] = (torch.uint8, (num_rows, num_bytes(num_kept, self.bits)))
            stored["scales"] = (torch.float16, (num_rows, -(-num_columns // self.group_size)))
        if pattern.is_structured:
            width = num_bytes(num_kept, _index_bits(pattern))
            stored["indices"] = (torch.uint8, (num_rows, width))
        else:
            stored["bitmask"] = (torch.uint8, (num_rows, num_bytes(num_columns, 1)))
        return stored


def pack_model(
    state_dict: Mapping[str, Tensor],
    keep_masks: Mapping[str, Tensor],
    pattern: Pattern,
    quantized: Mapping[str, Quantized] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of the packed file.

    Args:
        state_dict: of the pruned (and quantised) model.
        keep_masks: layer name -> bool (O, I), True = survives; exactly the pattern's count in
            every group (n:m), or its share of the layer (unstructured).
        pattern: of all masks.
        quantized: layer name -> codes and scales; layers that are missing are stored as values.

    Returns:
        (tensors on the CPU, metadata), as `save_packed` writes them. -0.0 at a pruned place
        becomes 0.0; everything else survives bit for bit, NaN included.

    Raises:
        InputError: masks, codes and state dict do not belong together; names the layer.
        PatternViolationError: a pruned weight is not zero.

    Cost: one copy of the packed tensors, and 8 bytes for each survivor of one layer at a time.
    """
    quantized = quantized or {}
    for name in [*keep_masks, *quantized]:
        if f"{name}.weight" not in state_dict or name not in keep_masks:
            lacking = "mask" if name not in keep_masks else "weight"
            raise InputError(f"pack: layer {name} has no {lacking}; the parts are of unlike runs")
    layers: dict[str, _LayerSpec] = {}
    tensors, aliases = without_aliases(state_dict, {f"{name}.weight" for name in keep_masks})
    for name, keep_mask in keep_masks.items():
        weight_OI = state_dict[f"{name}.weight"].detach().cpu()
        spec, stored = _pack_layer(name, weight_OI, keep_mask.cpu(), pattern, quantized.get(name))
        layers[name] = spec
        for part, tensor in stored.items():
            if f"{name}.weight.{part}" in state_dict:
                raise InputError(f"pack: {name}.weight.{part} is a tensor of the model already")
            tensors[f"{name}.weight.{part}"] = tensor
    header: dict[str, Any] = {
        "version": VERSION,
        "pattern": str(pattern),
        "layers": {name: layers[name].entry() for name in sorted(layers)},
        "aliases": aliases,
    }
    header["sha256"] = _digest(header, tensors)
    return tensors, {FORMAT: json.dumps(header, sort_keys=True)}


def save_packed(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    keep_masks: Mapping[str, Tensor],
    pattern: Pattern,
    quantized: Mapping[str, Quantized] | None = None,
) -> None:
    """Write the packed file; arguments and errors as `pack_model`. Equal models, equal bytes."""
    tensors, metadata = pack_model(state_dict, keep_masks, pattern, quantized)
    save_file(tensors, path, metadata=metadata)


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The dense state dict of a packed file, on the CPU; tied names share one tensor.

    Raises:
        InputError: no such file, truncated, corrupt, of another format or version; names the file
            and the cause. A checksum covers every byte that counts.

    Cost: reads the file once; a SHA-256 over its tensors.
    """
    if not Path(path).is_file():
        raise InputError(f"packed file {path}: there is no such file; {_EXPORT_AGAIN}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in tensor_names(file)}
    except (SafetensorError, OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise InputError(
            f"packed file {path}: truncated or corrupt ({cause}); {_EXPORT_AGAIN}"
        ) from None
    header = _read_header(path, metadata)
    try:
        return _unpacked(header, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        cause = " ".join(str(error.args[0] if error.args else error).split())
        raise InputError(f"packed file {path}: corrupt ({cause}); {_EXPORT_AGAIN}") from None


def packed_num_bytes(
    state_dict: Mapping[str, Tensor],
    layer_names: Collection[str],
    pattern: Pattern,
    bits: int | None = None,
    group_size: int | None = None,
) -> int:
    """Exact size of the packed tensors, without packing; the file adds its header (kilobytes).

    Args:
        state_dict: shapes and dtypes count, values do not. Tensors on the meta device have no
            memory to compare, so leave tied ones out there.
        layer_names: layers to be stored packed.
        pattern: of those layers.
        bits: of codes; None stores values.
        group_size: columns per scale; needed with `bits`.

    Raises:
        InputError: a layer is missing or the pattern does not divide it.
    """
    if (bits is None) != (group_size is None):
        raise InputError(f"bits={bits} with group_size={group_size}: give both, or neither")
    weights = {f"{name}.weight" for name in layer_names}
    if missing := sorted(weights - set(state_dict)):
        raise InputError(f"pack: {missing[0]} is not a tensor of the model")
    aliases = tied_names(state_dict, weights)
    total = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in state_dict.items()
        if name not in weights and name not in aliases
    )
    for name in layer_names:
        spec = _spec_of(name, state_dict[f"{name}.weight"], pattern, bits, group_size)
        for dtype, shape in spec.layout(pattern).values():
            total += math.prod(shape) * dtype.itemsize
    return total


def _pack_layer(
    name: str,
    weight_OI: Tensor,
    keep_OI: Tensor,
    pattern: Pattern,
    quantized: Quantized | None,
) -> tuple[_LayerSpec, dict[str, Tensor]]:
    """One layer's entry in the header and its tensors."""
    if keep_OI.dtype != torch.bool or keep_OI.shape != weight_OI.shape:
        raise InputError(
            f"{name}: keep mask {tuple(keep_OI.shape)} of {keep_OI.dtype} for a weight of "
            f"{tuple(weight_OI.shape)}; masks and model are of different runs"
        )
    bits, group_size = (quantized.bits, quantized.group_size) if quantized else (None, None)
    spec = _spec_of(name, weight_OI, pattern, bits, group_size)
    num_rows, num_columns = spec.shape
    num_kept = pattern.num_kept(num_columns)
    width, quota = (pattern.m, pattern.n) if pattern.is_structured else (num_columns, num_kept)
    counts_OG = keep_OI.reshape(num_rows, num_columns // width, width).sum(-1)
    is_even = not bool((counts_OG != quota).any())
    fits = not pattern.is_structured and find_violation(keep_OI, pattern) is None
    if not is_even and fits:
        num_kept = int(counts_OG.max())
        spec = replace(spec, num_kept=num_kept)
    elif not is_even:
        row, group = (counts_OG != quota).nonzero()[0].tolist()
        raise InputError(
            f"{name}: the mask keeps {int(counts_OG[row, group])} of the {width} weights from row "
            f"{row}, column {group * width}, but {pattern} keeps {quota}; it is another pattern's"
        )
    if bool(((weight_OI != 0) & ~keep_OI).any()):
        row, column = ((weight_OI != 0) & ~keep_OI).nonzero()[0].tolist()
        raise PatternViolationError(
            f"{name}: the pruned weight at row {row}, column {column} is not 0; apply the masks"
        )
    stored = {}
    is_filled_OK = torch.arange(num_kept) < keep_OI.sum(1, keepdim=True)
    if quantized is None:
        stored["values"] = _in_rows(weight_OI[keep_OI], is_filled_OK)
    else:
        codes_OI, scales_OG = quantized.codes_OI.cpu(), quantized.scales_OG.cpu()
        meant_OI = dequantize(codes_OI, scales_OG, quantized.group_size, weight_OI.dtype)
        if not torch.equal(meant_OI, weight_OI):
            raise InputError(
                f"{name}: the weight is not what its codes and scales stand for; it was changed "
                "after quantisation, quantise it again"
            )
        kept_OK = _in_rows(codes_OI[keep_OI], is_filled_OK)
        stored["codes"] = pack_bits(kept_OK.short() + 2 ** (quantized.bits - 1), quantized.bits)
        stored["scales"] = scales_OG.contiguous()
    if pattern.is_structured:
        columns_OI = torch.arange(num_columns).remainder(pattern.m).expand_as(keep_OI)
        indices_OK = columns_OI[keep_OI].reshape(num_rows, num_kept)
        stored["indices"] = pack_bits(indices_OK, _index_bits(pattern))
    else:
        stored["bitmask"] = pack_bits(keep_OI, 1)
    return spec, stored


def _in_rows(kept: Tensor, is_filled_OK: Tensor) -> Tensor:
    """Survivors, row by row, from the left of each row on; zeros after the last."""
    rows_OK = kept.new_zeros(is_filled_OK.shape)
    rows_OK[is_filled_OK] = kept
    return rows_OK


def _spec_of(
    name: str, weight: Tensor, pattern: Pattern, bits: int | None, group_size: int | None
) -> _LayerSpec:
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.ndim != 2 or dtype not in _DTYPES:
        raise InputError(
            f"{name}: {tuple(weight.shape)} of {dtype} cannot be packed; a matrix of "
            f"{', '.join(_DTYPES)} can"
        )
    num_rows, num_columns = weight.shape
    check_divides(name, num_columns, pattern)
    return _LayerSpec((num_rows, num_columns), dtype, bits, group_size)


def _read_header(path: str | Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The JSON under our key, with its version checked."""
    try:
        header = json.loads(metadata[FORMAT])
        version = header["version"]
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"packed file {path}: not a packed model (no readable {FORMAT!r} in its metadata); "
            f"{_EXPORT_AGAIN}"
        ) from None
    if version != VERSION:
        raise InputError(
            f"packed file {path}: version {version!r} of the format, this program reads version "
            f"{VERSION!r}; {_EXPORT_AGAIN}"
        )
    return header


def _unpacked(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense state dict; KeyError, TypeError or ValueError when anything does not fit."""
    if header.pop("sha256") != _digest(header, tensors):
        raise ValueError("its checksum differs from the recorded one")
    pattern = Pattern.parse(header["pattern"])
    dense = dict(tensors)
    for name, entry in header["layers"].items():
        spec = _LayerSpec(**{**entry, "shape": tuple(entry["shape"])})
        stored = {part: dense.pop(f"{name}.weight.{part}") for part in spec.layout(pattern)}
        for part, (dtype, shape) in spec.layout(pattern).items():
            if stored[part].dtype != dtype or stored[part].shape != shape:
                raise ValueError(f"{name}.weight.{part} has another shape or dtype than its layer")
        dense[f"{name}.weight"] = _unpack_layer(name, spec, stored, pattern)
    for name, source in header["aliases"].items():
        dense[name] = dense[source]
    return dense


def _unpack_layer(
    name: str, spec: _LayerSpec, stored: dict[str, Tensor], pattern: Pattern
) -> Tensor:
    num_columns = spec.shape[1]
    num_kept = spec.most_kept(pattern)
    keep_OI = torch.zeros(spec.shape, dtype=torch.bool)
    if pattern.is_structured:
        indices_OK = unpack_bits(stored["indices"], _index_bits(pattern), num_kept)
        starts_K = torch.arange(num_kept) // pattern.n * pattern.m
        if bool((indices_OK >= pattern.m).any()):
            raise ValueError(f"{name}.weight.indices: a column lies outside its group")
        keep_OI.scatter_(1, indices_OK.long() + starts_K, True)
    else:
        keep_OI = unpack_bits(stored["bitmask"], 1, num_columns).bool()
    counts_O1 = keep_OI.sum(1, keepdim=True)
    if bool((counts_O1 > num_kept).any() or (spec.num_kept is None and counts_O1.min() < num_kept)):
        raise ValueError(f"{name}.weight: positions of survivors are repeated or missing")
    is_filled_OK = torch.arange(num_kept) < counts_O1
    if spec.bits is None or spec.group_size is None:
        weight_OI = torch.zeros(spec.shape, dtype=_DTYPES[spec.dtype])
        weight_OI[keep_OI] = stored["values"][is_filled_OK]
        return weight_OI
    kept_OK = unpack_bits(stored["codes"], spec.bits, num_kept).short() - 2 ** (spec.bits - 1)
    codes_OI = torch.zeros(spec.shape, dtype=torch.int8)
    codes_OI[keep_OI] = kept_OK.to(torch.int8)[is_filled_OK]
    return dequantize(codes_OI, stored["scales"], spec.group_size, _DTYPES[spec.dtype])


def _index_bits(pattern: Pattern) -> int:
    """ceil(log2 m)."""
    return (pattern.m - 1).bit_length()


def _digest(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the header and the names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
