"""Keep-masks as data, in memory and in files.

A keep-mask is a boolean tensor of the weight's shape, True where the weight survives. On disk and
between processes it is a bit per weight. The masks of a pruned model are an artifact of their own:
a kept weight may be exactly 0.0, so zeros in the weights are not the mask.
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


def mask_to_bits(keep_mask: torch.Tensor) -> torch.Tensor:
    """Eight mask elements per byte.

    Args:
        keep_mask: bool tensor of any shape.

    Returns:
        uint8 tensor of ceil(numel / 8) bytes on the same device; element i (row-major) is bit
        i % 8 (counted from the lowest) of byte i // 8, unused bits of the last byte are 0.
    """
    return masks_to_bits(keep_mask.unsqueeze(0))[0]


def masks_to_bits(keep_masks: torch.Tensor) -> torch.Tensor:
    """`mask_to_bits` of each of a stack of masks, (E, ceil(numel / 8))."""
    if keep_masks.dtype != torch.bool:
        raise TypeError(f"keep_masks must be bool, not {keep_masks.dtype}")
    flat = keep_masks.flatten(1).to(torch.uint8)
    if flat.shape[1] % 8:
        flat = nn.functional.pad(flat, (0, -flat.shape[1] % 8))
    # Byte i of a word holds element i; times 2^(56 - 7 i) its bit is bit 56 + i of the product,
    # whose other terms stay below bit 56, without carries, or fall off the top.
    words = flat.flatten().view(torch.int64) * _GATHER_BITS
    return (words >> 56).to(torch.uint8).view(len(flat), flat.shape[1] // 8)


def mask_from_bits(bits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The bool tensor of `shape` that `mask_to_bits` made `bits` from, on the device of `bits`.

    Raises:
        InputError: `bits` has not the number of bytes that `shape` needs.
    """
    numel = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-numel // 8),):
        raise InputError(
            f"bits of a mask: {tuple(bits.shape)} of {bits.dtype}; a mask of shape "
            f"{tuple(shape)} needs {-(-numel // 8)} bytes"
        )
    return spread(bits, numel, torch.uint8, 1).view(torch.bool).view(*shape)


def spread(bits: torch.Tensor, numel: int, dtype: torch.dtype, one: int) -> torch.Tensor:
    """`numel` elements of an integer dtype from their bits: 0, or `one` where the bit is set."""
    made = _bits_of_bytes.__wrapped__ if torch.compiler.is_compiling() else _bits_of_bytes
    table = made(dtype, one, bits.device)
    if dtype == torch.uint8:  # a row of the table as one word
        words = table.view(torch.int64).flatten().index_select(0, bits.int())
        return words.view(torch.uint8)[:numel]
    return table.index_select(0, bits.int()).flatten()[:numel]


@functools.cache
def _bits_of_bytes(dtype: torch.dtype, one: int, device: torch.device) -> torch.Tensor:
    """(256, 8): the bits of every byte, lowest first."""
    bytes_B1 = torch.arange(256, device=device)[:, None]
    bits_B8 = (bytes_B1 >> torch.arange(8, device=device)) & 1
    return (bits_B8 * one).to(dtype)


def mask_digest(keep_mask: torch.Tensor) -> str:
    """SHA-256 (hex) of the mask's shape and bits."""
    return bits_digest(mask_to_bits(keep_mask), tuple(keep_mask.shape))


def bits_digest(bits: torch.Tensor, shape: tuple[int, ...]) -> str:
    """`mask_digest` of the mask of `shape` with these bits."""
    digest = hashlib.sha256(repr(shape).encode())
    digest.update(bits.cpu().numpy().tobytes())
    return digest.hexdigest()


class BitMasks(Mapping[str, torch.Tensor]):
    """Masks by layer name in memory, a bit per weight; each is a bool tensor when it is read.

    Args:
        bits: layer name -> `mask_to_bits` of its mask.
        shapes: layer name -> shape of its weight.
    """

    def __init__(
        self, bits: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        self.bits = dict(bits)
        self.shapes = {name: tuple(shapes[name]) for name in bits}

    @classmethod
    def of(cls, masks: Mapping[str, torch.Tensor]) -> BitMasks:
        """The same masks a bit per weight; `masks` itself if they are."""
        if isinstance(masks, BitMasks):
            return masks
        bits, shapes = {}, {}
        for name, mask in masks.items():
            bits[name], shapes[name] = mask_to_bits(mask), tuple(mask.shape)
        return cls(bits, shapes)

    def within(self, prefix: str) -> BitMasks:
        """The masks of layers inside the module `prefix`."""
        names = [name for name in self.bits if name.startswith(f"{prefix}.")]
        return BitMasks({name: self.bits[name] for name in names}, self.shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        return mask_from_bits(self.bits[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)


def save_masks(path: str | Path, masks: Mapping[str, torch.Tensor]) -> None:
    """Write masks (layer name -> bool tensor) as one safetensors file.

    The tensors are `mask_to_bits` of each; the metadata maps the format's name to the shapes as
    JSON. The same masks give the same bytes.
    """
    held = BitMasks.of(masks)
    save_mask_bits(path, held.bits, held.shapes)


def save_mask_bits(
    path: str | Path, bits: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]
) -> None:
    """`save_masks` of bits, in any order."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(bits)
    metadata = {_FORMAT: json.dumps({name: list(shapes[name]) for name in names})}
    write_tensors(path, {name: bits[name].cpu() for name in names}, metadata)


def merge_masks(paths: Sequence[Path], out: Path) -> None:
    """Put the mask files `paths`, of different layers, together in one, as bits."""
    shapes: dict[str, list[int]] = {}
    bits: dict[str, torch.Tensor] = {}
    for path in paths:
        masks = MaskFile(path)
        shapes.update(masks.shapes)
        bits.update(masks.bits())
    save_mask_bits(out, bits, shapes)


class MaskFile(Mapping[str, torch.Tensor]):
    """The masks in a file that `save_masks` or `merge_masks` wrote, read one at a time.

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
            return mask_from_bits(file.get_tensor(name), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.shapes))

    def __len__(self) -> int:
        return len(self.shapes)

    def bits(self) -> dict[str, torch.Tensor]:
        """Layer name -> uint8 bits, as `mask_to_bits` gives them."""
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


def load_masks(path: str | Path) -> BitMasks:
    """All masks of a file in memory; errors as `MaskFile`."""
    file = MaskFile(path)
    return BitMasks(file.bits(), file.shapes)
