"""The format `packed`: surviving weights and their positions alone (docs/formats.md)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.errors import InputError, PatternViolationError
from sparsify.formats.basis import carry_rotation
from sparsify.formats.kinds._base import (
    Export,
    Format,
    Written,
    sentence,
    transformers_call,
    weight_bytes,
)
from sparsify.formats.source import Source, in_order
from sparsify.formats.sparse_folder import read_sparsity, write_sparsity
from sparsify.formats.verify import check_packed
from sparsify.packed.folder import INDEX, PackedFolder
from sparsify.packed.layer import Codes, pack_layer
from sparsify.packed.layout import Contents, Layer, Scheme
from sparsify.packed.writer import GIGABYTE, PackedWriter
from sparsify.pattern import Pattern
from sparsify.quantization.codes import Quantized
from sparsify.tensors import tensor_names

NAME = "sparse-packed"

SHARD_BYTES = 5 * GIGABYTE

_IMPORT = "import sparsify.integrations"


def write_packed(
    folder: Path, source: Source, masks: Mapping[str, Tensor], pattern: Pattern,
    tokenizer: PreTrainedTokenizerBase, shard_bytes: int,
    codes_of: Callable[[str], Codes | None] = lambda _: None,
    fragments: Fragments | None = None,
) -> None:  # fmt: skip
    """Write a packed folder, layer by layer.

    Args:
        folder: made here.
        source: the model; pruned weights are zero.
        masks: layer name -> keep mask; these layers are packed, all other tensors are stored as
            they are.
        pattern: of all masks.
        tokenizer: saved beside it.
        shard_bytes: a file holds at most so much, or one layer.
        codes_of: layer name -> what its weights were rounded to; None stores values.
        fragments: layers that are packed already.

    Raises:
        PatternViolationError: a group is too full, or a pruned weight is not zero: the first layer,
            row and group.
        InputError: masks, codes and model do not belong together.

    Cost: memory for a shard and a layer.
    """
    writer = PackedWriter(folder, shard_bytes)
    layers: dict[str, Layer] = {}
    names, wanted = source.names(), set(masks)
    if lost := sorted(wanted - {name.removesuffix(".weight") for name in names}):
        raise InputError(f"pack: layer {lost[0]} has no weight; the parts are of unlike runs")
    for name in names:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in wanted:
            writer.add({name: source.tensor(name)})
            continue
        if fragments is not None and layer in fragments:
            size: tuple[int, int] = source.shape(name)  # type: ignore[assignment]
            layers[layer] = Layer(size, fragments.scheme_of(size[1]), pattern)
            parts = fragments.parts(layer)
        else:
            weight_OI, codes = source.tensor(name), codes_of(layer)
            layers[layer], parts = pack_layer(layer, weight_OI, masks[layer], pattern, codes)
        writer.add({f"{layer}.{part}": tensor for part, tensor in parts.items()})
    config = Contents(pattern, layers).to_dict()
    tokenizer.save_pretrained(folder)
    source.save_config(folder, config)
    writer.finish(config)


class Fragments:
    """Packed layers in files of a folder, each read when it is asked for.

    Args:
        folder: with what `quantization.quantize_checkpoint` left there.
        scheme_of: columns of a layer -> how it is stored.
    """

    def __init__(self, folder: Path, scheme_of: Callable[[int], Scheme]) -> None:
        self.scheme_of = scheme_of
        self._files: dict[str, dict[str, Path]] = {}
        for path in sorted(folder.glob("fragment-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in tensor_names(file):
                    layer, _, part = name.rpartition(".")
                    self._files.setdefault(layer, {})[part] = path

    def __contains__(self, layer: str) -> bool:
        return layer in self._files

    def parts(self, layer: str) -> dict[str, Tensor]:
        """Tensors of a layer by the last part of their names, in the order of `Layer.parts`."""
        found = {}
        for part, path in sorted(self._files[layer].items()):
            with safe_open(path, framework="pt") as file:
                found[part] = file.get_tensor(f"{layer}.{part}")
        return found


def publish_fragments(
    folder: Path, source: Source, masks: Mapping[str, Tensor], pattern: Pattern,
    tokenizer: PreTrainedTokenizerBase, fragments: Fragments,
) -> None:  # fmt: skip
    """`write_packed` of a model whose layers were packed block by block, and the sparsity.json of
    it; layers that are in no fragment are packed as values.

    Cost: memory for a shard and a layer.
    """
    write_packed(
        folder, source, masks, pattern, tokenizer, SHARD_BYTES, fragments=fragments
    )  # fmt: skip
    _describe(folder, masks, pattern, source.folder)


def _describe(folder: Path, masks: Mapping[str, Tensor], pattern: Pattern, made_from: Path) -> None:
    """Write sparsity.json, with the provenance of the model that it was made from."""
    before = read_sparsity(made_from) or {}
    carry_rotation(made_from, folder)
    write_sparsity(
        folder, masks, str(pattern), before.get("method", "given"), before.get("provenance", {})
    )


def save_packed_folder(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    masks: Mapping[str, Tensor], pattern: Pattern, quantized: Mapping[str, Quantized] | None,
    made_from: Path, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """`write_packed` of a model in memory, and the sparsity.json of it.

    Args:
        folder: made here.
        model: the sparse model; a quantised layer's codes come from `quantized`.
        tokenizer: saved beside it.
        masks: layer name -> bool keep mask (O, I).
        pattern: of the masks.
        quantized: layer name -> codes and scales, or None to pack the weights as they are.
        made_from: model folder whose provenance is kept.
        shard_bytes: see `write_packed`.
    """
    source = Source(model, None, None, made_from)
    found = {name: one.codes for name, one in (quantized or {}).items()}
    if lost := sorted(found.keys() - set(masks)):
        raise InputError(f"pack: layer {lost[0]} has no mask; the parts are of unlike runs")
    write_packed(folder, source, masks, pattern, tokenizer, shard_bytes, found.get)
    _describe(folder, masks, pattern, made_from)


def _write(export: Export) -> list[Written]:
    folder = export.folder / NAME
    write_packed(
        folder, export.source, export.masks, export.pattern, export.tokenizer, export.shard_bytes
    )
    _compare(export, folder)
    how = "only the kept values and their positions."
    found = [_written(export, NAME, how)]
    if export.quantized is not None:
        kind = _kind(PackedFolder(export.quantized))
        _copy(export.quantized, export.folder / f"{kind}-packed", export.shard_bytes)
        how = f"in {kind.upper()}, only the kept values and their positions."
        found.append(_written(export, f"{kind}-packed", how, is_quantized=True))
    return found


def _copy(source: Path, folder: Path, shard_bytes: int) -> None:
    """The same packed folder in files of another size."""
    packed = PackedFolder(source)
    leave = shutil.ignore_patterns("model*.safetensors", INDEX)
    shutil.copytree(source, folder, ignore=leave)
    writer = PackedWriter(folder, shard_bytes)
    for name in sorted(packed.shapes(), key=in_order):
        layer = name.removesuffix(".weight")
        if layer in packed.contents.layers:
            parts = packed.parts(layer)
            writer.add({f"{layer}.{part}": tensor for part, tensor in parts.items()})
        else:
            writer.add({name: packed.tensor(name)})
    writer.finish(packed.contents.to_dict())


def _written(export: Export, name: str, how: str, is_quantized: bool = False) -> Written:
    folder = export.folder / name
    gate = check_packed(folder)
    what = sentence(export.pattern, how)
    size = weight_bytes(folder)
    return Written(name, what, transformers_call(name, _IMPORT), gate, size, is_quantized)


def _kind(packed: PackedFolder) -> str:
    """What most of the layers are stored as: int4, int8, fp8, nf4."""
    kinds = [f"{layer.scheme.type}{layer.scheme.bits or ''}" if layer.scheme.type == "int"
             else layer.scheme.type for layer in packed.contents.layers.values()]  # fmt: skip
    return max(sorted(set(kinds)), key=kinds.count)


def _compare(export: Export, folder: Path) -> None:
    """What was written unpacks to what was to be written."""
    packed = PackedFolder(folder)
    for name in packed.shapes():
        wanted = export.source.tensor(name)
        if not torch.equal(packed.dense(name, wanted.dtype), wanted):
            raise PatternViolationError(
                f"{folder}: {name} is not as it was written; the disk lost it, export again"
            )


FORMAT = Format("packed", "only the kept values and their positions", _write)
