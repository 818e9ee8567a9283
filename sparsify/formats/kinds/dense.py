"""The format `dense`: the weights with their zeros stored, in the Hugging Face layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from sparsify.errors import PatternViolationError
from sparsify.formats.kinds._base import (
    Export,
    Format,
    Written,
    sentence,
    transformers_call,
    weight_bytes,
)
from sparsify.formats.sparse_folder import MASKS
from sparsify.formats.verify import check_files
from sparsify.masks.storage import save_masks
from sparsify.models.load import check_checkpoint
from sparsify.models.save import finish_weights
from sparsify.models.stored import places_in
from sparsify.tensors import Shards

NAME = "sparse"


def _write(export: Export) -> list[Written]:
    folder = export.folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    export.tokenizer.save_pretrained(folder)
    export.source.save_config(folder)
    if (export.source.folder / MASKS).is_file():
        (folder / MASKS).parent.mkdir(exist_ok=True)
        shutil.copyfile(export.source.folder / MASKS, folder / MASKS)
    else:
        save_masks(folder / MASKS, export.masks)
    _write_weights(export, folder)
    check_checkpoint(folder)
    _compare(export, folder)
    gate = check_files(folder, export.masks, export.pattern)
    what = sentence(export.pattern, "stored dense with zeros; loads like any other model.")
    return [Written(NAME, what, transformers_call(NAME), gate, weight_bytes(folder))]


def _write_weights(export: Export, folder: Path) -> None:
    """One file, or several and their index."""
    shards = Shards(folder, export.shard_bytes)
    for name, tensor in export.source.stored():
        shards.add({name: tensor})
    finish_weights(shards, folder)


def _compare(export: Export, folder: Path) -> None:
    """What was written is what was to be written."""
    places = {p.name: p for p in places_in(sorted(folder.glob("model*.safetensors")))}
    for name, tensor in export.source.stored():
        if not torch.equal(places[name].read(None), tensor):
            raise PatternViolationError(
                f"{folder}: {name} is not as it was written; the disk lost it, export again"
            )


FORMAT = Format("dense", "zeros stored; loads everywhere as it is", _write)
