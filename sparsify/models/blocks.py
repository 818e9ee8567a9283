"""A model's decoder blocks one at a time: in memory, or read from a checkpoint and let go again.

`BlocksOnDisk` holds what comes before the blocks and one or two blocks, whatever the size of the
model, so that a model is pruned on a device, or a machine, that it does not fit on.
`ShardWriter` puts finished blocks into a model folder while the rest is still being worked on.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparsify.errors import InputError
from sparsify.files import resolve_path, write_json
from sparsify.models.layout import Layout, layout_of
from sparsify.models.load import (
    DTYPES,
    build_model,
    check_checkpoint,
    check_finite,
    stored_places,
)
from sparsify.models.save import copy_generation_config
from sparsify.models.stored import (
    Place,
    Stored,
    check_stored,
    own_places,
    places_in,
    stored_tensors,
)
from sparsify.models.structure import find_blocks
from sparsify.tensors import write_tensors

if TYPE_CHECKING:  # 3.4 s, for which nothing here asks before a model is made
    from transformers import PreTrainedModel

_METADATA = {"format": "pt"}

_SHARD_BYTES = 2 * 2**30  # of tensors outside the blocks


class Blocks(Protocol):
    """A model whose blocks can be had one after another."""

    list_name: str
    blocks: nn.ModuleList

    @property
    def model(self) -> nn.Module:
        """The whole model; blocks that are not open may have no weights."""
        ...

    def open(self, index: int) -> nn.Module:
        """Block `index` with its weights, on the model's device."""
        ...

    def close(self, index: int) -> None:
        """The block is not needed any more."""
        ...


class BlocksInMemory:
    """The blocks of a model that is in memory as a whole; they stay there."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.list_name, self.blocks = find_blocks(model)

    @property
    def model(self) -> nn.Module:
        """The whole model."""
        return self._model

    def open(self, index: int) -> nn.Module:
        """The block, as it is."""
        return self.blocks[index]

    def close(self, index: int) -> None:
        """Nothing to do."""


class BlocksOnDisk:
    """The blocks of a checkpoint folder, each read when it is opened and dropped when closed.

    While a block is open, the next one is read from the disk in the background.

    Args:
        path: model folder, or "embedded".
        dtype: float32, bfloat16 or float16; the weights are cast to it.
        device: where open blocks, and what comes before the blocks, are.
        with_head: also what comes after the blocks, so that the whole model can run once all
            blocks are open; without it, a head of its own stays unread.

    Raises:
        InputError: see `models.load.check_checkpoint`; or the checkpoint's tensors are not named
            and shaped as the model's (`reason_to_hold_whole` says so without raising); or a weight
            outside the blocks, read or not, is NaN or infinite.
    """

    def __init__(
        self, path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu",
        with_head: bool = False,
    ) -> None:  # fmt: skip
        folder = resolve_path(path)
        check_checkpoint(folder)
        self.folder = folder
        self.dtype = dtype
        self._device = torch.device(device)
        self._model, stored, reason = open_stored(folder, dtype)
        if reason is not None:
            raise InputError(f"model folder {folder}: {reason}; load the whole model instead")
        self._places = stored.places
        self.list_name, self.blocks = find_blocks(self.model)
        head = {id(p) for p in _parameters_of(self.model.get_output_embeddings())}
        first = {id(p) for p in _parameters_of(self.model.get_input_embeddings())}
        unused = {name for name, p in self.model.named_parameters() if id(p) in head - first}
        if with_head:
            unused = set()
        outside = [name for name in self.rest_names() if name not in unused]
        self._assign(self._read(outside))
        self.model.tie_weights()
        for module in self.model.modules():  # made from the config, on the CPU: masks, angles
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self._device)
        check_finite(folder, self.model, dtype)
        check_stored(folder, {n: self._places[n] for n in sorted(unused)}, DTYPES[dtype])
        self.model.eval()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="next block")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model; blocks that are not open have no weights."""
        return self._model

    def rest_names(self) -> list[str]:
        """Names of the tensors outside the blocks."""
        return sorted(name for name in self._places if not name.startswith(f"{self.list_name}."))

    def open(self, index: int) -> nn.Module:
        """The block with its weights; the next one is fetched meanwhile.

        Raises:
            InputError: a weight is NaN or infinite.
        """
        _give_back_freed_memory()
        if self._next is not None and self._next[0] == index:
            tensors = self._next[1].result()
        else:
            tensors = self._read(self._names_of(index))
        self._next = None
        if index + 1 < len(self.blocks):
            names = self._names_of(index + 1)
            self._next = (index + 1, self._reader.submit(self._read, names))
        else:
            self._reader.shutdown()
        self._assign(tensors)
        prefix = f"{self.list_name}.{index}"
        check_finite(self.folder, self.blocks[index], self.dtype, prefix)
        return self.blocks[index]

    def close(self, index: int) -> None:
        """Let go of the block's weights."""
        self.blocks[index].to("meta")

    def tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the checkpoint in the model's dtype, on the CPU, one in memory at a time."""
        for name in names:
            yield from self._read([name]).items()

    def _names_of(self, index: int) -> list[str]:
        prefix = f"{self.list_name}.{index}."
        return [name for name in self._places if name.startswith(prefix)]

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """Copies of tensors; a file is mapped only while one is read."""
        return {name: self._places[name].read(DTYPES[self.dtype]) for name in names}

    def _assign(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            parent, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(parent)
            value = tensor.to(self._device)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value


def _give_back_freed_memory() -> None:
    """Have glibc return what earlier blocks left free to the system; nothing elsewhere.

    It keeps freed tensors of less than 32 MB for later ones, between others that are still held:
    a process that goes through many blocks grew by up to a block with each (measured: 60 blocks of
    26 MB, of which half was kept, took 3.4 GB in place of 1.7).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reason_to_hold_whole(path: str | Path) -> str | None:
    """Why a checkpoint cannot be read block by block, or None when it can.

    Its tensors must have the names and shapes of the model's own. Checkpoints that transformers
    renames or merges while loading have not, but for experts (`unfuse.unfuse_experts`). Tensors
    that transformers passes over are no reason, nor is a head of its own in a model that says it
    is tied.

    Raises:
        InputError: see `models.load.check_checkpoint`.
    """
    folder = resolve_path(path)
    check_checkpoint(folder)
    return open_stored(folder, "float32")[2]


def stored_of(path: str | Path, dtype: str) -> Stored:
    """What the files of a checkpoint hold, by the names of the model in `dtype`.

    Raises:
        InputError: see `models.load.check_checkpoint`.
    """
    folder = resolve_path(path)
    check_checkpoint(folder)
    return open_stored(folder, dtype)[1]


def layer_places(folder: Path) -> Iterator[tuple[str, Place]]:
    """Every tensor in the safetensors files of a folder, whatever they are called, by the name that
    the model has for it: one for each layer of experts that are stored fused.

    Cost: headers; of files that may hold such experts also the model, without weights.
    """
    places = list(places_in(sorted(folder.glob("*.safetensors"))))
    return own_places(places, layout_in(folder, places))


def layout_in(folder: Path, places: Iterable[Place]) -> Layout:
    """How the tensors of a model folder are stored, which `places` are."""
    has_config = (folder / "config.json").is_file()
    # By their dimensions, or as matrices that are called experts and are not numbered.
    if not has_config or not any(
        len(place.shape) == 3 or re.search(r"\bexperts\.(?!\d)", place.name) for place in places
    ):
        return Layout()
    with torch.device("meta"):
        return layout_of(build_model(folder))


def open_stored(folder: Path, dtype: str) -> tuple[PreTrainedModel, Stored, str | None]:
    """The model of a checked checkpoint without weights, where its tensors are, and why these are
    not all of the model's by name and shape, None if they are."""
    model = _empty_model(folder, dtype)
    stored = stored_tensors(stored_places(folder), model, DTYPES[dtype])
    return model, stored, _reason(model, stored)


def _reason(model: PreTrainedModel, stored: Stored) -> str | None:
    needed = dict(model.named_parameters())
    if missing := sorted(needed.keys() - stored.places.keys()):
        return f"{len(missing)} tensors of the model are not in it by name, such as {missing[0]}"
    if unexpected := stored.foreign:
        return f"it has {len(unexpected)} tensors that the model has not, such as {unexpected[0]}"
    for name, place in stored.places.items():
        if name in needed and place.shape != tuple(needed[name].shape):
            wanted = tuple(needed[name].shape)
            return f"tensor {name} has shape {place.shape} where config.json asks for {wanted}"
    return None


def _parameters_of(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _empty_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The model of config.json with real buffers and parameters that have only a shape."""
    with _parameters_on_meta():
        model = build_model(folder, dtype)
    return model.requires_grad_(False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that are made inside have no memory; buffers have, for no file holds some."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def block_tensors(prefix: str, block: nn.Module) -> dict[str, Tensor]:
    """A block's tensors on the CPU under their full names; they outlive its closing."""
    return {
        prefix + name: value.detach().cpu().contiguous()
        for name, value in block.state_dict().items()
    }


class ShardWriter:
    """Writes a model folder block by block; `finish` makes it one that any loader takes.

    Args:
        folder: where the shards go; made if it is not there.
        source: the model whose blocks come.
    """

    def __init__(self, folder: Path, source: Blocks) -> None:
        self.folder = folder
        self._num_blocks = len(source.blocks)
        self._layout = layout_of(source.model)
        folder.mkdir(parents=True, exist_ok=True)

    def write_block(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write one block's tensors, from `block_tensors`, as the family stores them; whole or
        absent."""
        stored = dict(self._layout.joined(tensors.items()))
        write_tensors(self.folder / self._shard(index), stored, _METADATA)

    def finish(self, source: BlocksOnDisk) -> None:
        """Write the tensors outside the blocks, the index and config.json."""
        number, num_bytes = self._num_blocks, 0
        held: dict[str, Tensor] = {}
        for name, tensor in self._layout.joined(source.tensors(source.rest_names())):
            if held and num_bytes + tensor.nbytes > _SHARD_BYTES:
                write_tensors(self.folder / self._shard(number), held, _METADATA)
                number, held, num_bytes = number + 1, {}, 0
            held[name] = tensor
            num_bytes += tensor.nbytes
        write_tensors(self.folder / self._shard(number), held, _METADATA)
        config = source.model.config
        config.architectures = [type(source.model).__name__]
        config.dtype = DTYPES[source.dtype]
        config.save_pretrained(self.folder)
        copy_generation_config(source.folder, self.folder)
        self._write_index()

    def _write_index(self) -> None:
        weight_map, total = {}, 0
        for path in sorted(self.folder.glob("model-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                weight_map.update(dict.fromkeys(file.keys(), path.name))
            with path.open("rb") as raw:
                header = int.from_bytes(raw.read(8), "little")
            total += path.stat().st_size - 8 - header
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)

    def _shard(self, index: int) -> str:
        return f"model-{index + 1:05d}.safetensors"
