"""Hidden states of the calibration rows between two blocks: where they are kept, and on disk.

They are one tensor per batch of rows and model. Pruning follows up to two models, the one that is
being pruned and the dense one. States are kept where there is room (`placement`), and `commit` puts
them on disk so that a run that was killed resumes at this block.
Shape suffixes: B rows of a batch, T tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sparsify.errors import InputError
from sparsify.files import fsync
from sparsify.tensors import write_tensors

Placement = Literal["device", "host", "disk"]

_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Memory:
    """Where a model's walk works and keeps things, and how much at once."""

    batch_size: int
    """rows per forward"""
    dtype: str = "float32"
    """of a checkpoint's blocks: float32, bfloat16 or float16"""
    device: str | torch.device = "cpu"
    """where a checkpoint's blocks are worked on"""
    activations: Placement = "device"
    """where its hidden states are kept between blocks, see `HiddenStateStore`"""
    spare_bytes: float | None = None
    """of the device, beside the hidden states, for what is kept to save work (`room.Room`); None:
    as many as it takes if the hidden states are there too, none if they wait elsewhere"""
    attention: str = "auto"
    """over rows of several documents: masked; varlen, by document; auto: varlen where a GPU has a
    kernel for it and the model allows it, see `models.varlen_check.choose_attention`"""
    overlap: bool = False
    """while layers are solved, factor the Hessians of the next ones (orders block and dense), and
    have the dense model pass the next block where it is followed (order layer with a teacher, order
    dense); the hidden states are kept on the device then. The results are the same to the bit"""


class HiddenStateStore:
    """The hidden states of this process's batches, all before the same block.

    Args:
        placement: "device" keeps them beside the weights, "host" in host memory (pinned where the
            device is a GPU), "disk" in one file per batch, so that only one batch is in memory.
        device: where they are needed.
        folder: for "disk" and for `commit`; None: kept in memory, cannot be committed.
        rank, world_size: names of this process's files.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device | str,
        folder: Path | None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if placement == "disk" and folder is None:
            raise InputError("activations=disk: needs a folder to write to")
        self._placement = placement
        self._device = torch.device(device)
        self._folder = folder
        self._part = f"{rank:04d}-of-{world_size:04d}"
        self._held: dict[tuple[str, int], Tensor] = {}
        self._files: dict[tuple[str, int], Path] = {}

    @property
    def is_on_device(self) -> bool:
        """Whether there is room beside the weights."""
        return self._placement == "device"

    def put(self, model: str, batch: int, hidden_BTD: Tensor, block: int) -> None:
        """Keep the batch's hidden states (B, T, D) in `model` before block `block`."""
        key = (model, batch)
        if self._placement == "disk":
            path = self._path(block, f"{model}-{batch:06d}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {_name(*key): hidden_BTD.cpu().contiguous()}, _METADATA)
            self._files[key] = path
        elif self._placement == "host" and self._device.type != "cpu":
            self._copy_to_host(key, hidden_BTD)
        else:
            self._held[key] = hidden_BTD

    def _copy_to_host(self, key: tuple[str, int], hidden_BTD: Tensor) -> None:
        """Into the batch's pinned memory, which lasts as long as the store."""
        held = self._held.get(key)
        if held is None or held.shape != hidden_BTD.shape:
            held = torch.empty(hidden_BTD.shape, dtype=hidden_BTD.dtype, pin_memory=True)
            self._held[key] = held
        held.copy_(hidden_BTD)

    def get(self, model: str, batch: int) -> Tensor:
        """The batch's hidden states in `model`, on the device."""
        key = (model, batch)
        if key in self._held:
            return self._held[key].to(self._device, non_blocking=True)
        # Through the CPU: safetensors takes "cuda" for the first GPU, whichever is this process's.
        return load_file(self._files[key])[_name(*key)].to(self._device)

    def commit(self, block: int) -> None:
        """Bring the states before `block` to the disk; earlier blocks' files stay until `drop`."""
        if self._folder is None or self._placement == "disk":
            return  # there is nowhere to write to, or every batch is on disk already
        path = self._path(block, f"part-{self._part}")
        path.parent.mkdir(parents=True, exist_ok=True)
        held = {_name(*key): value.cpu().contiguous() for key, value in self._held.items()}
        write_tensors(path, held, _METADATA)

    def drop(self, keep_block: int) -> None:
        """Remove this folder's files of all blocks but `keep_block`; one process calls it."""
        if self._folder is None or not self._folder.is_dir():
            return  # nothing was written: a model of one block has no states between blocks
        for folder in self._folder.glob("before-*"):
            if folder != self._block_folder(keep_block):
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()
        fsync(self._folder)

    def restore(self, block: int, models: Iterable[str], batches: Iterable[int]) -> None:
        """Take up the committed states before `block`, whichever processes wrote them.

        Raises:
            InputError: a batch's states are missing or damaged.
        """
        assert self._folder is not None
        wanted = {_name(model, batch): (model, batch) for model in models for batch in batches}
        for path in sorted(self._block_folder(block).glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in wanted.keys() & set(file.keys()):
                        self._take(wanted.pop(name), file.get_tensor(name), path)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: damaged ({error}); remove {self._folder.parent} to start this "
                    "pruning over"
                ) from None
        if wanted:
            raise InputError(
                f"{self._block_folder(block)}: no hidden states of {next(iter(wanted))}; remove "
                f"{self._folder.parent} to start this pruning over"
            )

    def _take(self, key: tuple[str, int], hidden_BTD: Tensor, path: Path) -> None:
        if self._placement == "disk" and path.stem == f"{key[0]}-{key[1]:06d}":
            self._files[key] = path
        elif self._placement == "device":
            self._held[key] = hidden_BTD.to(self._device, copy=True)
        elif self._placement == "host" and self._device.type != "cpu":
            self._copy_to_host(key, hidden_BTD)
        else:
            self._held[key] = hidden_BTD.clone()

    def _block_folder(self, block: int) -> Path:
        assert self._folder is not None
        return self._folder / f"before-{block:05d}"

    def _path(self, block: int, stem: str) -> Path:
        return self._block_folder(block) / f"{stem}.safetensors"


def _name(model: str, batch: int) -> str:
    return f"{model}.{batch:06d}"
