"""Safetensors files that are whole or absent."""

from __future__ import annotations

from pathlib import Path

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
