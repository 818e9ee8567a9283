"""An open checkpoint of compressed-tensors: its tensors as a dense model has them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sparsify.errors import InputError
from sparsify.listing import listed
from sparsify.models.foreign._base import SCALES, Args, Part, Reader
from sparsify.models.foreign._config import ForeignConfig
from sparsify.tensors import tensor_names

_COPY_AGAIN = "copy or download the file again"


@functools.cache
def readers() -> tuple[Reader, ...]:
    """Every reader: the modules of this folder without an underscore."""
    return tuple(listed(__name__.rpartition(".")[0], "READER"))


@dataclass(frozen=True)
class _Layer:
    """A layer that is stored in parts."""

    reader: Reader
    parts: dict[str, Part]
    args: Args | None
    shape: tuple[int, int]


class ForeignFolder:
    """A checkpoint whose layers are stored in one of the readers' ways.

    Args:
        folder: with config.json.
        config: what that says.
        files: its safetensors files.

    Raises:
        InputError: a tensor of a layer is missing, or of another dtype or shape than the layer's
            others and the configuration say; names it.

    Cost: reads headers, and the shapes that are stored as tensors.
    """

    def __init__(self, folder: Path, config: ForeignConfig, files: Sequence[Path]) -> None:
        self.folder = folder
        self.config = config
        self._parts = {part.name: part for path in files for part in _header(path)}
        by_layer: dict[str, dict[str, Part]] = {}
        for name, part in self._parts.items():
            layer, _, last = name.rpartition(".")
            by_layer.setdefault(layer, {})[last] = part
        self._layers: dict[str, _Layer] = {}
        for name, parts in by_layer.items():
            if reader := _reader_of(parts):
                self._layers[name] = self._open(name, reader, parts)
            elif "weight" in parts and parts["weight"].dtype not in (*SCALES, "F64"):
                weight = parts["weight"]
                raise self._bad(f"tensor {weight.name} is of {weight.dtype} and has no scales")

    @property
    def num_layers(self) -> int:
        """How many layers are stored in parts."""
        return len(self._layers)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor as a dense model has it."""
        used = {part.name for layer in self._layers.values() for part in layer.parts.values()}
        found = {name: part.shape for name, part in self._parts.items() if name not in used}
        return found | {f"{name}.weight": layer.shape for name, layer in self._layers.items()}

    def dense(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor as a dense model has it, on the CPU.

        Args:
            name: one of `shapes`.
            dtype: floating point values are cast to it; codes become it without a rounding
                between. None: as they are stored, and codes as float32.

        Raises:
            InputError: the stored values contradict each other; names the tensor.
        """
        stem = name.removesuffix(".weight")
        layer = self._layers.get(stem) if stem != name else None
        if layer is None:
            found = self._parts[name].read()
        else:
            try:
                found = layer.reader.decode(layer.parts, layer.args, layer.shape)
            except InputError as error:
                raise self._bad(error) from None
        return found.to(dtype or found.dtype) if found.is_floating_point() else found

    def _bad(self, error: InputError | str) -> InputError:
        return InputError(f"model folder {self.folder}: {error}; {_COPY_AGAIN}")

    def _open(self, name: str, reader: Reader, parts: dict[str, Part]) -> _Layer:
        if lost := [part for part in reader.required if part not in parts]:
            key = f"{name}.{reader.key}"
            raise self._bad(f"tensor {name}.{lost[0]} is missing, which belongs to {key}")
        own = {part: parts[part] for part in (*reader.required, *reader.optional) if part in parts}
        if "weight" in parts and "weight" not in own:
            raise self._bad(f"tensor {name}.weight is there beside {name}.{reader.key}")
        args = self.config.args_of(name)
        try:
            return _Layer(reader, own, args, reader.shape(own, args))
        except InputError as error:
            raise self._bad(error) from None


def _reader_of(parts: dict[str, Part]) -> Reader | None:
    """The reader of a layer with these tensors: of those whose key is there, the one that finds
    most of what it needs, for `weight_scale` belongs to several."""
    found = [one for one in readers() if one.key in parts]
    return max(found, key=lambda one: sum(p in parts for p in one.required), default=None)


def _header(path: Path) -> list[Part]:
    with safe_open(path, framework="pt") as file:
        slices = ((name, file.get_slice(name)) for name in tensor_names(file))
        return [Part(path, n, one.get_dtype(), tuple(one.get_shape())) for n, one in slices]
