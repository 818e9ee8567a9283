"""A packed folder on the disk: its index, and reading that trusts nothing.

Every tensor's size and SHA-256 are in the index, so are each file's size and its header's SHA-256,
the configuration's, and the index's own: what is cut or changed is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.files import readable, write_json
from sparsify.packed.layer import DTYPES, keep_mask_of, unpack_layer
from sparsify.packed.layout import (
    EXPORT_AGAIN,
    FLOATS,
    FORMAT,
    METHOD,
    VERSION,
    Contents,
    Layer,
    check_version,
    part_bytes,
)

INDEX = "model.safetensors.index.json"

VERSION_1 = "model.packed.safetensors"
"""the one file of folders that were written before"""

_CHUNK_BYTES = 2**23

_THREADS = 4

_COPY_AGAIN = "copy or download the file again"

_DTYPES = {
    **DTYPES, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a stored tensor is, and what it must be."""

    file: Path
    dtype: str
    """as safetensors names it"""
    shape: tuple[int, ...]
    start: int
    """first byte in the file"""
    num_bytes: int
    sha256: str


class PackedFolder:
    """An open packed folder; configuration, index and headers are checked, nothing else is read.

    Args:
        folder: with config.json.
        config: its `quantization_config`, where it has been read already.

    Raises:
        InputError: no packed folder of this version, or one that is incomplete or damaged; names
            the folder and the tensor, or the file whose header it is.

    Cost: reads config.json, the index and the headers.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        with readable(f"packed folder {folder}"):
            given = _configuration(folder) if config is None else config
            self.contents = Contents.from_dict(given, f"{folder / 'config.json'}")
            index = self._index(given)
            self._places: dict[str, Place] = {}
            for name in sorted(index["files"]):
                self._read_header(folder / name, index)
        if lost := sorted(index["tensors"].keys() - self._places.keys()):
            raise self._bad(f"tensor {lost[0]} is in no file", _COPY_AGAIN)
        for name, layer in self.contents.layers.items():
            self._check_layer(name, layer)

    def __iter__(self) -> Iterator[str]:
        """Names of the stored tensors."""
        return iter(sorted(self._places))

    def place(self, name: str) -> Place:
        """Where a stored tensor is."""
        return self._places[name]

    @property
    def files(self) -> list[Path]:
        """Those that the index names."""
        return sorted({place.file for place in self._places.values()})

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(place.num_bytes for place in self._places.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor as a dense model has it: packed ones as their weights."""
        parts = {f"{n}.{part}" for n in self.contents.layers for part in self._parts_of(n)}
        found = {n: place.shape for n, place in self._places.items() if n not in parts}
        return found | {f"{n}.weight": layer.shape for n, layer in self.contents.layers.items()}

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, its bytes compared with the index.

        Raises:
            InputError: they differ.

        Cost: one read; SHA-256 of its bytes.
        """
        place = self._places[name]
        content = bytearray(place.num_bytes)
        with place.file.open("rb") as file:
            file.seek(place.start)
            file.readinto(content)
        self._compare(name, hashlib.sha256(content))
        flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()
        return flat.view(_DTYPES[place.dtype]).view(place.shape)

    def parts(self, layer: str) -> dict[str, Tensor]:
        """The tensors of a packed layer, by the last part of their names; errors as `tensor`."""
        return {part: self.tensor(f"{layer}.{part}") for part in self._parts_of(layer)}

    def dense(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor as a dense model has it, on the CPU; errors as `tensor`.

        Args:
            name: one of `shapes`.
            dtype: floating point values are cast to it; codes become it without a rounding
                between. None: as they are stored, and codes as float32.
        """
        layer = self.contents.layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            found = self.tensor(name)
            return found.to(dtype or found.dtype) if found.is_floating_point() else found
        parts = self.parts(name.removesuffix(".weight"))
        own = parts["weight"].dtype if layer.scheme.type == "float" else torch.float32
        return unpack_layer(layer, parts, dtype or own)

    def keep_mask(self, layer: str) -> Tensor:
        """A packed layer's keep mask (O, I), from its positions.

        Raises:
            InputError: as `tensor`, and positions that no N:M mask has.
        """
        try:
            return keep_mask_of(self.contents.layers[layer], self.parts(layer))
        except InputError as error:
            if str(error).startswith("packed folder"):
                raise
            raise self._bad(f"tensor {layer}.weight_indices: {error}", EXPORT_AGAIN) from None

    def check_bytes(self) -> None:
        """Compare every tensor's bytes with the index.

        Raises:
            InputError: they differ; names the first such tensor.

        Cost: reads all files once; a SHA-256 over everything, in a few threads (0.4 to 2 GB/s
        each, as the processor has instructions for it).
        """

        def digest(name: str) -> Any:
            place, found = self._places[name], hashlib.sha256()
            for chunk in _chunks(place.file, place.start, place.num_bytes):
                found.update(chunk)
            return found

        with ThreadPoolExecutor(_THREADS) as threads:
            for name, found in zip(self, threads.map(digest, self), strict=True):
                self._compare(name, found)

    def _parts_of(self, layer: str) -> list[str]:
        known = self.contents.layers[layer]
        return list(known.parts(num_survivors=0))

    def _bad(self, what: str, fix: str) -> InputError:
        return InputError(f"packed folder {self.folder}: {what}; {fix}")

    def _compare(self, name: str, found: Any) -> None:
        place = self._places[name]
        if found.hexdigest() != place.sha256:
            raise self._bad(
                f"tensor {name} in {place.file.name} is not as it was written (its SHA-256 "
                "differs)", _COPY_AGAIN,
            )  # fmt: skip

    def _index(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The index, whole and of this configuration."""
        path = self.folder / INDEX
        if not path.is_file():
            if (self.folder / VERSION_1).is_file():
                raise version_1(self.folder)
            raise self._bad(f"{INDEX} is missing, so nothing says what belongs to it", EXPORT_AGAIN)
        try:
            index = json.loads(path.read_bytes())
            metadata = index["metadata"]
            own, config_sha256 = metadata["sha256"], metadata["quantization_config_sha256"]
            for key in ("files", "tensors", "weight_map"):
                dict(index[key])
        except (ValueError, KeyError, TypeError) as error:
            cause = " ".join(str(error).split())
            raise self._bad(
                f"{INDEX} is no index of a packed folder ({cause})", EXPORT_AGAIN
            ) from None
        if metadata.get("format") == FORMAT:
            check_version(metadata.get("version"), f"packed folder {self.folder}: {INDEX}")
        if _digest_of_index(index) != own:
            raise self._bad(f"{INDEX} is not as it was written", _COPY_AGAIN)
        if digest_of(dict(config)) != config_sha256:
            raise self._bad(
                f"quantization_config of config.json is not the one that {INDEX} was written for",
                "copy both files again",
            )
        return index

    def _read_header(self, path: Path, index: Mapping[str, Any]) -> None:
        """Enter the tensors of one file."""
        if not path.is_file():
            raise self._bad(f"{path.name} is missing", _COPY_AGAIN)
        known, size = index["files"][path.name], path.stat().st_size
        with path.open("rb") as file:
            head = file.read(known["header_bytes"])
        if hashlib.sha256(head).hexdigest() != known["header_sha256"]:
            raise self._bad(f"the header of {path.name} is not as it was written", _COPY_AGAIN)
        for name, entry in sorted(json.loads(head[8:]).items(), key=_first_byte):
            if name == "__metadata__":
                continue
            start, end = (len(head) + offset for offset in entry["data_offsets"])
            told = index["tensors"].get(name)
            if told is None or index["weight_map"].get(name) != path.name:
                raise self._bad(f"tensor {name} of {path.name} is not in {INDEX}", _COPY_AGAIN)
            if size < end:
                raise self._bad(f"tensor {name}: {path.name} ends within it", _COPY_AGAIN)
            self._places[name] = Place(
                path, entry["dtype"], tuple(entry["shape"]), start, end - start, told["sha256"]
            )
        if size != known["num_bytes"]:
            raise self._bad(f"{path.name} is longer than it was written", _COPY_AGAIN)

    def _check_layer(self, name: str, layer: Layer) -> None:
        """The layer's tensors are there, with the dtypes and shapes that its scheme says."""
        weight = self._places.get(f"{name}.weight")
        if weight is None:
            raise self._bad(f"tensor {name}.weight is missing", EXPORT_AGAIN)
        is_float = layer.scheme.type == "float" and weight.dtype in FLOATS
        num = None
        if not layer.pattern.is_structured:
            num = weight.shape[0] * (2 if layer.scheme.bits == 4 else 1) if weight.shape else 0
        for part, expected in layer.parts(weight.dtype if is_float else "F32", num).items():
            place = self._places.get(f"{name}.{part}")
            if place is None:
                raise self._bad(f"tensor {name}.{part} is missing", EXPORT_AGAIN)
            if (place.dtype, place.shape) != expected or place.num_bytes != part_bytes(*expected):
                kind = layer.scheme.name
                raise self._bad(
                    f"tensor {name}.{part} is {place.shape} of {place.dtype} where {kind} of a "
                    f"layer of {layer.shape} has {expected[1]} of {expected[0]}", EXPORT_AGAIN,
                )  # fmt: skip


def version_1(folder: Path) -> InputError:
    """The error of a folder of the format's first version."""
    return InputError(
        f"packed folder {folder}: {VERSION_1} is version 1 of the packed format, which is no "
        f"longer read; {EXPORT_AGAIN}"
    )


def open_packed(folder: Path) -> PackedFolder | None:
    """The packed folder, or None where a folder is none; errors as `PackedFolder`."""
    if (folder / VERSION_1).is_file():
        raise version_1(folder)
    try:
        found = json.loads((folder / "config.json").read_bytes())["quantization_config"]
        is_packed = found["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whoever reads the configuration says what is wrong with it
    return PackedFolder(folder, found) if is_packed else None


def write_index(
    folder: Path, names: Iterable[str], config: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write the index of a packed folder, whose files are there; what makes it a packed folder.

    Args:
        folder: with the files.
        names: of the safetensors files.
        config: `quantization_config` of its config.json.
        hashes: tensor name -> SHA-256 of its bytes, where known from the memory that was written;
            others are taken from the files.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    for name in sorted(names):
        path = folder / name
        with path.open("rb") as file:
            length = file.read(8)
            head = length + file.read(int.from_bytes(length, "little"))
        files[name] = {
            "num_bytes": path.stat().st_size,
            "header_bytes": len(head),
            "header_sha256": hashlib.sha256(head).hexdigest(),
        }
        for tensor, entry in json.loads(head[8:]).items():
            if tensor == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            known = (hashes or {}).get(tensor)
            if known is None:
                found = hashlib.sha256()
                for chunk in _chunks(path, len(head) + start, end - start):
                    found.update(chunk)
                known = found.hexdigest()
            tensors[tensor] = {"num_bytes": end - start, "sha256": known}
            weight_map[tensor] = name
    index: dict[str, Any] = {
        "metadata": {
            "format": FORMAT,
            "version": VERSION,
            "total_size": sum(entry["num_bytes"] for entry in tensors.values()),
            "quantization_config_sha256": digest_of(dict(config)),
        },
        "files": files,
        "tensors": dict(sorted(tensors.items())),
        "weight_map": dict(sorted(weight_map.items())),
    }
    index["metadata"]["sha256"] = _digest_of_index(index)
    write_json(folder / INDEX, index)


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of JSON with sorted keys and without spaces, all of it ASCII."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's bytes, as a file holds them."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def _digest_of_index(index: Mapping[str, Any]) -> str:
    metadata = {key: value for key, value in index["metadata"].items() if key != "sha256"}
    return digest_of({**index, "metadata": metadata})


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_bytes())["quantization_config"]
        if found["quant_method"] != METHOD:
            raise ValueError(f"quant_method is {found['quant_method']!r}")
    except (ValueError, KeyError, TypeError) as error:
        if (folder / VERSION_1).is_file():
            raise version_1(folder) from None
        cause = " ".join(str(error).split())
        raise InputError(
            f"{path}: no packed model's (its quantization_config has no quant_method {METHOD!r}; "
            f"{cause}); {EXPORT_AGAIN}"
        ) from None
    return dict(found)


def _first_byte(item: tuple[str, Any]) -> tuple[int, int]:
    """Sorts tensors of a header as they lie in the file."""
    return tuple(item[1]["data_offsets"]) if item[0] != "__metadata__" else (-1, -1)


def _chunks(path: Path, start: int, num_bytes: int) -> Iterator[bytes]:
    """Bytes of a file, some at a time."""
    with path.open("rb") as file:
        file.seek(start)
        while num_bytes and (chunk := file.read(min(num_bytes, _CHUNK_BYTES))):
            num_bytes -= len(chunk)
            yield chunk
