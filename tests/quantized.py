"""Packed folders of quantised models for tests, their codes made here by rounding to nearest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparsify.formats.kinds.packed import write_packed
from sparsify.formats.source import Source
from sparsify.models.load import load_pair
from sparsify.models.masked import apply_masks_, infer_masks
from sparsify.packed.layer import NF4, Codes
from sparsify.packed.layout import Scheme
from sparsify.pattern import Pattern


def rounded(weight_OI: Tensor, scheme: Scheme) -> Codes:
    """Codes of a weight whose zeros stay zeros; the last group may be short."""
    num_columns = weight_OI.shape[1]
    size = scheme.group_size or num_columns
    padded = torch.nn.functional.pad(weight_OI.float(), (0, -num_columns % size))
    groups = padded.unflatten(1, (-1, size))
    if scheme.type == "fp8":
        scales = groups.abs().amax(-1) / 448
        return Codes((weight_OI.float() / scales).to(torch.float8_e4m3fn), scales, scheme)
    if scheme.type == "nf4":
        scales = groups.abs().amax(-1).half()
        distance = (groups / scales.float()[..., None]).unsqueeze(-1) - torch.tensor(NF4)
        codes = distance.abs().argmin(-1).flatten(1)[:, :num_columns]
        return Codes(codes.to(torch.uint8), scales, scheme)
    top = 2 ** (scheme.bits or 4) - 1
    if scheme.symmetric:
        scales = (groups.abs().amax(-1) / (top // 2)).half()
        steps = scales.float().masked_fill(scales == 0, 1)[..., None]
        codes = (groups / steps).round().clamp(-(top // 2) - 1, top // 2)
        return Codes(codes.flatten(1)[:, :num_columns].to(torch.int8), scales, scheme)
    low = groups.amin(-1).clamp(max=0)
    scales = ((groups.amax(-1).clamp(min=0) - low) / top).half()
    zeros = (-low / scales.float()).round().clamp(0, top)
    codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, top)
    codes = codes.flatten(1)[:, :num_columns].to(torch.uint8)
    return Codes(codes, scales, scheme, zeros.to(torch.uint8))


def meant(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The weight that codes stand for, in float64 and then rounded to `dtype`."""
    num_columns = codes.values_OI.shape[1]
    size = codes.scheme.group_size or num_columns

    def spread(part: Tensor) -> Tensor:
        return part.double().repeat_interleave(size, 1)[:, :num_columns]

    if codes.scheme.type == "nf4":
        numbers = torch.tensor(NF4).double()[codes.values_OI.long()]
    else:
        numbers = codes.values_OI.double()
    if codes.zeros_OG is not None:
        numbers = numbers - spread(codes.zeros_OG)
    return (numbers * spread(codes.scales_OG)).float().to(dtype) + 0.0


def packed_with(
    folder: Path,
    model_dir: Path,
    scheme: Scheme,
    dtype: str = "float32",
    pattern: str = "2:4",
    per_row: bool = False,
    zero_rows: int = 0,
    factor: float = 1.0,
) -> Path:
    """A model pruned by magnitude and rounded to a scheme, as a packed folder; returns `folder`.

    Args:
        folder: made here.
        model_dir: the dense model.
        scheme: of every layer.
        dtype: of the model.
        pattern: of the zeros.
        per_row: a layer's groups are as wide as its rows, whatever the scheme says.
        zero_rows: so many rows of every layer have no weight but 0.
        factor: that the layers' weights are multiplied by.
    """
    model, tokenizer = load_pair(model_dir, dtype)
    parsed = Pattern.parse(pattern)
    masks = infer_masks(model, parsed, may_be_dense=True)
    apply_masks_(model, masks)
    codes = {}
    for name in masks:
        weight = model.get_submodule(name).weight.data.mul_(factor)
        weight[:zero_rows] = 0
        own = replace(scheme, group_size=weight.shape[1]) if per_row else scheme
        codes[name] = rounded(weight, own)
        weight.copy_(meant(codes[name], weight.dtype))
    source = Source(model, None, None, model_dir)
    write_packed(folder, source, masks, parsed, tokenizer, 10**9, codes.get)
    return folder
