"""Safetensors files that are whole or absent, and what of a state dict is stored once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify.files import written_whole


def tensor_names(file: safe_open) -> list[str]:
    """Names in an open safetensors file, which is no mapping though it has keys."""
    return list(file.keys())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all; the same tensors give the same bytes."""
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def without_aliases(
    state_dict: Mapping[str, Tensor], packed: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to be stored as they are, each once, and name -> name for the tied rest."""
    aliases = tied_names(state_dict, packed)
    dense: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name not in packed and name not in aliases:
            dense[name] = tensor.detach().cpu().contiguous()
            if dense[name].untyped_storage().nbytes() != dense[name].nbytes:
                dense[name] = dense[name].clone()  # safetensors refuses views of shared memory
    return dense, aliases


def tied_names(state_dict: Mapping[str, Tensor], packed: Collection[str]) -> dict[str, str]:
    """name -> earlier name of the very same memory, among the tensors that are not packed."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in state_dict.items():
        if name in packed or tensor.is_meta or tensor.numel() == 0:
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases
