"""The format `compressed-tensors`: the quantised model as stock engines and transformers have it.

Every code is stored, those of pruned weights too, which are exactly 0. These programs know nothing
of the zeros: what gets faster is what the quantisation makes faster. Made from the packed folder of
the quantised model, layer by layer; no code is rounded again.

Shape suffixes: O output features, I input features, G groups of columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import InputError, PatternViolationError
from sparsify.files import write_json
from sparsify.formats.kinds._base import (
    Export,
    Format,
    Written,
    sentence,
    transformers_call,
    weight_bytes,
)
from sparsify.formats.kinds.packed import SHARD_BYTES
from sparsify.formats.source import in_order, open_source
from sparsify.formats.verify import PackedMasks, check_weights
from sparsify.masks.bits import pack_bits
from sparsify.models.layout import layout_of
from sparsify.models.load import DTYPES, INDEX, load_tokenizer, open_encoded, read_config
from sparsify.packed.codes import unpack_codes
from sparsify.packed.folder import PackedFolder, open_packed
from sparsify.packed.layer import Codes
from sparsify.packed.layout import Layer
from sparsify.tensors import Shards

GROUP_SIZES = (32, 64, 128)
"""of weights in 4 or 8 bits that vLLM's kernels know, besides one group a row"""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""layers that engines store as one, so that all of them are quantised or none"""

_OPTION = "export.formats=[compressed-tensors]"


@dataclass(frozen=True)
class Plan:
    """How all quantised layers of a model are written."""

    label: str
    """W4A16, W8A16, W8A8 or FP8"""
    format: str
    """as compressed-tensors calls it"""
    weights: dict[str, Any]
    """of the group in config.json, as `activations`"""
    activations: dict[str, Any] | None

    @property
    def folder(self) -> str:
        """Name of the folder of a run."""
        return f"compressed-{self.label.lower()}"

    @property
    def num_bits(self) -> int:
        """Of a code."""
        return int(self.weights["num_bits"])


def plan_of(layers: Mapping[str, Layer]) -> Plan:
    """How the layers of a packed model would be written; those that store values stay dense.

    Raises:
        InputError: nothing is quantised, or a layer's scheme is not one that stock programs read,
            or not the same as the others'.
    """
    coded = {name: layer for name, layer in layers.items() if layer.scheme.has_codes}
    if not coded:
        raise InputError(f"{_OPTION}: no layer is quantised; add quantize to stages")
    first = next(iter(coded))
    per_row = all(_is_per_row(layer) for layer in coded.values())
    found = {name: _plan(name, layer, per_row) for name, layer in coded.items()}
    for name, plan in found.items():
        if plan != found[first]:
            raise InputError(
                f"{_OPTION}: {first} is {layers[first].scheme.name} and {name} "
                f"{layers[name].scheme.name}; engines read one scheme for all layers"
            )
    return found[first]


def check_fused(quantised: set[str], linears: set[str]) -> None:
    """InputError where layers that engines store as one are quantised in part."""
    for name in sorted(quantised):
        parent, _, last = name.rpartition(".")
        for group in _FUSED:
            rest = [f"{parent}.{one}" for one in group if last in group]
            lost = [one for one in rest if one in linears and one not in quantised]
            if lost:
                raise InputError(
                    f"{_OPTION}: {name} is quantised and {lost[0]} is not, which engines store as "
                    "one; quantise both, or neither (quantize.skip, prune.skip)"
                )


def check_family(model: Any) -> None:
    """InputError where a family stores experts fused: engines look for these, and not for one
    quantised matrix for each expert."""
    if layout_of(model).fused:
        raise InputError(
            f"{_OPTION}: {type(model).__name__} holds all experts of a layer as one tensor, of "
            "which the format has no quantised form that transformers loads; use "
            "export.formats=[dense,packed]"
        )


def _is_per_row(layer: Layer) -> bool:
    size = layer.scheme.group_size
    return size is None or size >= layer.shape[1]


def _plan(name: str, layer: Layer, per_row: bool) -> Plan:
    scheme, num_columns = layer.scheme, layer.shape[1]
    if scheme.type == "nf4":
        raise InputError(
            f"{_OPTION}: {name} is NF4, which compressed-tensors does not have; quantise to int4, "
            "int8 or fp8"
        )
    if not scheme.symmetric:
        # transformers 5.23 with compressed-tensors 0.20.1 expects zero points of another shape than
        # the one that the format has, and that compressed-tensors itself writes.
        raise InputError(
            f"{_OPTION}: {name} has zero points, with which transformers does not load the format; "
            "quantise with quantize.symmetric=true"
        )
    size = scheme.group_size or num_columns
    weights: dict[str, Any] = {
        "num_bits": scheme.bits or 8, "type": "float" if scheme.type == "fp8" else "int",
        "symmetric": True, "dynamic": False,
        "strategy": "channel" if per_row else "group", "group_size": None if per_row else size,
    }  # fmt: skip
    if scheme.type == "fp8":
        return Plan("FP8", "float-quantized", weights, _per_token("float"))
    if scheme.activations == "int8":
        if not per_row:
            raise InputError(
                f"{_OPTION}: {name} has groups of {size} for {num_columns} columns; beside int8 "
                "activations engines read one scale for each output channel"
            )
        return Plan("W8A8", "int-quantized", weights, _per_token("int"))
    if not per_row and (num_columns % size or size not in GROUP_SIZES):
        fits = [str(one) for one in GROUP_SIZES if num_columns % one == 0]
        use = " or ".join([*fits, "one scale for each output channel"])
        raise InputError(
            f"{_OPTION}: {name} has groups of {size} for {num_columns} columns; engines read "
            f"{', '.join(map(str, GROUP_SIZES))}, where these divide the columns; use {use}"
        )
    return Plan(f"W{scheme.bits}A16", "pack-quantized", weights, None)


def _per_token(kind: str) -> dict[str, Any]:
    """Activations that the engine rounds to 8 bits as they come, with a scale for every token."""
    return {
        "num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True,
        "group_size": None,
    }  # fmt: skip


def write_compressed(
    folder: Path, source: Path, shard_bytes: int = SHARD_BYTES
) -> tuple[Plan, dict[str, int]]:
    """Write a packed folder of a quantised model as a folder of compressed-tensors.

    Scales are stored in the model's dtype, which is what programs cast them to when they load:
    bfloat16 has 3 bits fewer than the float16 of packed ones, so that a weight may be 0.2 % off.

    Args:
        folder: made here.
        source: packed folder.
        shard_bytes: a file holds at most so much, or one layer.

    Returns:
        How it is written, and the counts of `formats.verify.check_files`.

    Raises:
        InputError: see `plan_of`, `check_family` and `check_fused`; or a scale is out of the
            dtype's range.
        PatternViolationError: what was written does not come back.

    Cost: a layer, and a shard, in memory; reads the source twice.
    """
    packed = PackedFolder(source)
    plan = plan_of(packed.contents.layers)
    opened = open_source(source, None)
    check_family(opened.model)
    linears = {n for n, m in opened.model.named_modules() if isinstance(m, nn.Linear)}
    coded = {n for n, layer in packed.contents.layers.items() if layer.scheme.has_codes}
    check_fused(coded, linears)
    dtype = _dtype(source)
    load_tokenizer(source).save_pretrained(folder)
    opened.save_config(folder, _config(plan, sorted(linears - coded, key=in_order)))
    shards, total = Shards(folder, shard_bytes), 0
    for name in sorted(packed.shapes(), key=in_order):
        tensors = _tensors(packed, name, plan, dtype)
        shards.add(tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
    weight_map = shards.finish()
    if len(set(weight_map.values())) == 1:
        (folder / next(iter(weight_map.values()))).replace(folder / "model.safetensors")
    else:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    masks, pattern = PackedMasks(packed), packed.contents.pattern
    return plan, check_weights(_compared(packed, folder, dtype), folder, masks, pattern)


def _dtype(folder: Path) -> torch.dtype:
    return DTYPES[str(read_config(folder).dtype or "float32").removeprefix("torch.")]


def _config(plan: Plan, dense: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. Without the status, loaders look for dense weights."""
    group = {
        "targets": ["Linear"], "weights": plan.weights, "input_activations": plan.activations,
        "output_activations": None, "format": plan.format,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": plan.format,
        "quantization_status": "compressed", "config_groups": {"group_0": group},
        "ignore": dense, "kv_cache_scheme": None,
    }  # fmt: skip


def _tensors(packed: PackedFolder, name: str, plan: Plan, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a tensor of the dense model is stored as."""
    stem = name.removesuffix(".weight")
    layer = packed.contents.layers.get(stem) if stem != name else None
    if layer is None or not layer.scheme.has_codes:
        return {name: packed.dense(name)}
    codes = _codes(packed, stem, dtype)
    if plan.format != "pack-quantized":
        return {f"{stem}.weight": codes.values_OI, f"{stem}.weight_scale": codes.scales_OG}
    unsigned_OI = codes.values_OI.short() + 2 ** (plan.num_bits - 1)
    return {
        f"{stem}.weight_packed": _words(unsigned_OI, plan.num_bits),
        f"{stem}.weight_scale": codes.scales_OG,
        f"{stem}.weight_shape": torch.tensor(layer.shape, dtype=torch.int64),
    }


def _codes(packed: PackedFolder, name: str, dtype: torch.dtype) -> Codes:
    """A layer's codes with scales in `dtype`; groups of scale 0 get 1, and the code of 0.

    Raises:
        InputError: a scale is out of the range of `dtype`.
    """
    layer = packed.contents.layers[name]
    codes = unpack_codes(layer, packed.parts(name))
    exact_OG = codes.scales_OG.float()
    is_none_OG = exact_OG == 0
    exact_OG = exact_OG.masked_fill(is_none_OG, 1.0)
    scales_OG = exact_OG.to(dtype)
    if bool(((scales_OG.float() - exact_OG).abs() > exact_OG.abs() * 2**-8).any()):
        raise InputError(
            f"{_OPTION}: {name} has a scale that {str(dtype).removeprefix('torch.')} cannot hold; "
            "prune and quantise with model.dtype=bfloat16"
        )
    values_OI = codes.values_OI
    if bool(is_none_OG.any()):
        is_none_OI = _per_column(layer, is_none_OG)
        values_OI = torch.where(is_none_OI, torch.zeros_like(values_OI), values_OI)
    return Codes(values_OI, scales_OG, codes.scheme)


def _per_column(layer: Layer, part_OG: Tensor) -> Tensor:
    """(O, I)."""
    size = layer.scheme.group_size or layer.shape[1]
    return part_OG.repeat_interleave(size, dim=1)[:, : layer.shape[1]]


def _words(numbers: Tensor, bits: int) -> Tensor:
    """int32 words of unsigned numbers (R, N), the first in the lowest bits; rows end on a word."""
    rows = pack_bits(numbers, bits)
    rows = nn.functional.pad(rows, (0, -rows.shape[1] % 4))
    return rows.contiguous().view(torch.int32)


def _compared(
    packed: PackedFolder, folder: Path, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(name, dense tensor) of what was written, once it means what was to be written."""
    written = open_encoded(folder)
    assert written is not None, "its configuration was written above"
    for name in packed.shapes():
        stem = name.removesuffix(".weight")
        layer = packed.contents.layers.get(stem) if stem != name else None
        if layer is None or not layer.scheme.has_codes:
            expected = packed.dense(name)
        else:
            codes = _codes(packed, stem, dtype)
            expected = codes.values_OI.float() * _per_column(layer, codes.scales_OG.float())
        found = written.dense(name)
        if not torch.equal(found, expected):
            raise PatternViolationError(
                f"{folder}: {name} is not as it was written; the disk lost it, export again"
            )
        yield name, found


def _write(export: Export) -> list[Written]:
    source = export.quantized
    if source is None and open_packed(export.source.folder) is not None:
        source = export.source.folder
    if source is None:
        raise InputError(
            f"{_OPTION}: there is no quantised model; add quantize to stages, or point run.from= "
            "at a run that has quantised"
        )
    packed = PackedFolder(source)
    name = plan_of(packed.contents.layers).folder
    plan, gate = write_compressed(export.folder / name, source, export.shard_bytes)
    how = (
        f"quantised to {plan.label} in the format of compressed-tensors, zeros stored. vLLM, "
        "SGLang and transformers (with pip install compressed-tensors) load it as it is; they gain "
        "the quantisation's speed only, not the sparsity's: they know nothing of the zeros."
    )
    what = sentence(packed.contents.pattern, how)
    size = weight_bytes(export.folder / name)
    return [Written(name, what, transformers_call(name), gate, size, is_quantized=True)]


FORMAT = Format("compressed-tensors", "W4A16, W8A16, W8A8 or FP8 for stock engines", _write)
