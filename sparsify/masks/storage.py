"""Keep-masks as data, in memory and in files.

A keep-mask is a boolean tensor of the weight's shape, True where the weight survives. On disk and
between processes it is bit-packed (1/8 of a byte per weight). The masks of a pruned model are an
artifact of their own: a kept weight may be exactly 0.0, so zeros in the weights are not the mask.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sparsify.errors import InputError
from sparsify.tensors import write_tensors

_GATHER_BITS = sum(1 << (56 - 7 * i) for i in range(8))

_FORMAT = "twofour-masks-1"  # also the one key of the metadata: several have no fixed order


def pack_mask(keep_mask: torch.Tensor) -> torch.Tensor:
    """Eight mask elements per byte.

    Args:
        keep_mask: bool tensor of any shape.

    Returns:
        uint8 tensor of ceil(numel / 8) bytes on the same device; element i (row-major) is bit
        i % 8 (counted from the lowest) of byte i // 8, unused bits of the last byte are 0.
    """
    if keep_mask.dtype != torch.bool:
        raise TypeError(f"keep_mask must be bool, not {keep_mask.dtype}")
    flat = keep_mask.flatten().to(torch.uint8)
    if flat.numel() % 8:
        flat = nn.functional.pad(flat, (0, -flat.numel() % 8))
    # Byte i of a word holds element i; times 2^(56 - 7 i) its bit is bit 56 + i of the product,
    # whose other terms stay below bit 56, without carries, or fall off the top.
    words = flat.view(torch.int64) * _GATHER_BITS
    return (words >> 56).to(torch.uint8)


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The bool tensor of `shape` that `pack_mask` made `packed` from, on the device of `packed`.

    Raises:
        InputError: `packed` has not the number of bytes that `shape` needs.
    """
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-numel // 8),):
        raise InputError(
            f"packed mask: {tuple(packed.shape)} of {packed.dtype}; a mask of shape "
            f"{tuple(shape)} needs {-(-numel // 8)} bytes"
        )
    return spread(packed, numel, torch.uint8, 1).view(torch.bool).view(*shape)


def spread(packed: torch.Tensor, numel: int, dtype: torch.dtype, one: int) -> torch.Tensor:
    """`numel` elements of an integer dtype from their bits: 0, or `one` where the bit is set."""
    table = _bits_of_bytes(dtype, one, packed.device)
    if dtype == torch.uint8:  # a row of the table as one word
        words = table.view(torch.int64).flatten().index_select(0, packed.int())
        return words.view(torch.uint8)[:numel]
    return table.index_select(0, packed.int()).flatten()[:numel]


@functools.cache
def _bits_of_bytes(dtype: torch.dtype, one: int, device: torch.device) -> torch.Tensor:
    """(256, 8): the bits of every byte, lowest first."""
    bytes_B1 = torch.arange(256, device=device)[:, None]
    bits_B8 = (bytes_B1 >> torch.arange(8, device=device)) & 1
    return (bits_B8 * one).to(dtype)


def mask_digest(keep_mask: torch.Tensor) -> str:
    """SHA-256 (hex) of the mask's shape and packed bits."""
    return packed_digest(pack_mask(keep_mask), tuple(keep_mask.shape))


def packed_digest(packed: torch.Tensor, shape: tuple[int, ...]) -> str:
    """`mask_digest` of the mask of `shape` that was packed."""
    digest = hashlib.sha256(repr(shape).encode())
    digest.update(packed.cpu().numpy().tobytes())
    return digest.hexdigest()


class PackedMasks(Mapping[str, torch.Tensor]):
    """Masks by layer name in memory, a bit per weight; what is read is unpacked, one at a time.

    Args:
        packed: layer name -> `pack_mask` of its mask.
        shapes: layer name -> shape of its weight.
    """

    def __init__(
        self, packed: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        self.packed = dict(packed)
        self.shapes = {name: tuple(shapes[name]) for name in packed}

    @classmethod
    def of(cls, masks: Mapping[str, torch.Tensor]) -> PackedMasks:
        """The same masks packed; `masks` itself if they are."""
        if isinstance(masks, PackedMasks):
            return masks
        packed, shapes = {}, {}
        for name, mask in masks.items():
            packed[name], shapes[name] = pack_mask(mask), tuple(mask.shape)
        return cls(packed, shapes)

    def within(self, prefix: str) -> PackedMasks:
        """The masks of layers inside the module `prefix`."""
        names = [name for name in self.packed if name.startswith(f"{prefix}.")]
        return PackedMasks({name: self.packed[name] for name in names}, self.shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        return unpack_mask(self.packed[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)


def save_masks(path: str | Path, masks: Mapping[str, torch.Tensor]) -> None:
    """Write masks (layer name -> bool tensor) as one safetensors file.

    The tensors are `pack_mask` of each; the metadata maps the format's name to the shapes as JSON.

    The same masks give the same bytes.
    """
    held = PackedMasks.of(masks)
    save_packed_masks(path, held.packed, held.shapes)


def save_packed_masks(
    path: str | Path, packed: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]
) -> None:
    """`save_masks` of masks that are packed already, in any order."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(packed)
    metadata = {_FORMAT: json.dumps({name: list(shapes[name]) for name in names})}
    write_tensors(path, {name: packed[name].cpu() for name in names}, metadata)


def merge_masks(paths: Sequence[Path], out: Path) -> None:
    """Put the mask files `paths`, of different layers, together in one; they are not unpacked."""
    shapes: dict[str, list[int]] = {}
    packed: dict[str, torch.Tensor] = {}
    for path in paths:
        masks = MaskFile(path)
        shapes.update(masks.shapes)
        packed.update(masks.packed())
    save_packed_masks(out, packed, shapes)


class MaskFile(Mapping[str, torch.Tensor]):
    """The masks in a file that `save_masks` or `merge_masks` wrote, unpacked one at a time.

    Raises:
        InputError: no such file, not a mask file, or truncated or corrupt.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise InputError(f"mask file {path}: there is no such file; run the prune stage first")
        with self._open() as file:
            metadata = file.metadata() or {}
        if _FORMAT not in metadata:
            raise InputError(
                f"mask file {path}: not a mask file of this version (no {_FORMAT!r} in its "
                "metadata); run the prune stage again"
            )
        self.shapes: dict[str, list[int]] = json.loads(metadata[_FORMAT])

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        with self._open() as file:
            return unpack_mask(file.get_tensor(name), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.shapes))

    def __len__(self) -> int:
        return len(self.shapes)

    def packed(self) -> dict[str, torch.Tensor]:
        """Layer name -> uint8 bits, as `pack_mask` gives them."""
        with self._open() as file:
            return {name: file.get_tensor(name) for name in self}

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self._path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"mask file {self._path}: truncated or corrupt ({error}); run the prune stage again"
            ) from None


def load_masks(path: str | Path) -> PackedMasks:
    """All masks of a file in memory; errors as `MaskFile`."""
    file = MaskFile(path)
    return PackedMasks(file.packed(), file.shapes)
