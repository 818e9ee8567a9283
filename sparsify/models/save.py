"""Model folders in the Hugging Face layout, written so that every pruned layer is found again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from sparsify.files import write_json
from sparsify.models.layout import layout_of
from sparsify.models.load import GENERATION, INDEX, quiet_transformers, weight_files
from sparsify.models.stored import own_places, places_in
from sparsify.models.structure import find_blocks, linears_of
from sparsify.tensors import Shards

if TYPE_CHECKING:  # 3.4 s, for which nothing here asks before there is a model
    from transformers import PreTrainedModel


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> bool:
    """Write a model folder: safetensors, config.json and the tokenizer.

    The same weights give the same bytes. The folder may exist; files of the same names in it are
    replaced.

    Tensors get the names that the family's checkpoints have. transformers gives some families'
    linear layers other names than their modules (Gemma 3 with its vision part); whoever looks for
    a pruned layer would not find it: such a model is written under the names of its modules, which
    transformers loads too.

    Args:
        model: what to write.
        tokenizer: written beside it; None for none.
        folder: where to.
        state_dict: its tensors, where they are not in the model itself.

    Returns:
        Whether the tensors have the names of the family's checkpoints.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layout = layout_of(model)
    if layout.fused:
        state = (state_dict or model.state_dict()).items()
        state_dict = dict(layout.joined((name, tensor.cpu()) for name, tensor in state))
    with quiet_transformers():
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        model.save_pretrained(folder, state_dict=state_dict)
        if _has_names_of(model, folder):
            return True
        for path in weight_files(folder):
            path.unlink()
        (folder / INDEX).unlink(missing_ok=True)
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        return False


def _has_names_of(model: torch.nn.Module, folder: Path) -> bool:
    """Whether every linear layer of the decoder blocks is in the files under its own name."""
    list_name, blocks = find_blocks(model)
    wanted = {
        f"{list_name}.{index}.{name}.weight"
        for index, block in enumerate(blocks)
        for name in linears_of(block)
    }
    places = places_in(weight_files(folder))
    return wanted <= {name for name, _ in own_places(places, layout_of(model))}


def finish_weights(shards: Shards, folder: Path) -> None:
    """Give a model's weight files their names: one file, or several and their index."""
    weight_map = shards.finish()
    files = set(weight_map.values())
    if len(files) == 1:
        (folder / files.pop()).replace(folder / "model.safetensors")
        return
    index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def copy_generation_config(source: Path, target: Path) -> None:
    """Give a model folder the generation_config.json of the one it was made from, if it has one."""
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, target / GENERATION)
