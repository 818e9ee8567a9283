"""Keep-masks as data, and as a hold on weights while they train.

A keep-mask is a boolean tensor of the weight's shape, True where the weight survives. On disk and
between processes it is bit-packed (1/8 of a byte per weight). The masks of a pruned model are an
artifact of their own: a kept weight may be exactly 0.0, so zeros in the weights are not the mask.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sparsify.errors import InputError, PatternViolationError
from sparsify.files import write_tensors
from sparsify.models.structure import find_blocks
from sparsify.pattern import check_divides, find_violation, keep_mask_from_scores

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from sparsify.pattern import Pattern

_GATHER_BITS = sum(1 << (56 - 7 * i) for i in range(8))
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
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
    return _spread(packed, numel, torch.uint8, 1).view(torch.bool).view(*shape)


def _spread(packed: torch.Tensor, numel: int, dtype: torch.dtype, one: int) -> torch.Tensor:
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


def save_masks(path: str | Path, masks: dict[str, torch.Tensor]) -> None:
    """Write masks (layer name -> bool tensor) as one safetensors file.

    The tensors are `pack_mask` of each; the metadata maps the format's name to the shapes as JSON.

    The same masks give the same bytes.
    """
    packed = {name: pack_mask(mask) for name, mask in masks.items()}
    save_packed_masks(path, packed, {name: tuple(mask.shape) for name, mask in masks.items()})


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


def load_masks(path: str | Path) -> dict[str, torch.Tensor]:
    """All masks of a file in memory, one byte per weight; errors as `MaskFile`."""
    return dict(MaskFile(path))


def infer_masks(
    model: nn.Module, pattern: Pattern, skip: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """The masks of a model that was pruned elsewhere, from the zeros in its block linears.

    Every non-zero weight is kept. Where a group (or row) has more zeros than the pattern asks
    for, the surplus zeros are kept too, lowest column first, so that every mask has exactly the
    pattern's count and a weight that is zero by chance can still train.

    Args:
        model: a model whose blocks `sparsify.models.structure.find_blocks` finds.
        pattern: what every linear layer of the blocks must satisfy.
        skip: glob patterns of full layer names that were left dense.

    Returns:
        Full layer name (without ".weight") -> bool tensor of the weight's shape.

    Raises:
        InputError: a layer does not satisfy the pattern; names layer, row and column.
    """
    masks = {}
    for name, weight in _block_weights(model, pattern, skip):
        violation = find_violation(weight, pattern)
        if violation is not None:
            row, column = violation
            raise InputError(
                f"{name}: not pruned to {pattern} (row {row}, from column {column}: too many "
                "non-zero weights); prune the model first, skip this layer, or let masks move from "
                "dense weights (distill.moving_share)"
            )
        masks[name] = keep_mask_from_scores(weight.abs(), pattern)
    return masks


def masks_of_largest(
    model: nn.Module, pattern: Pattern, skip: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Masks that keep the largest |W| of every group (or row) of a model's block linears.

    Of a model that satisfies the pattern they are those of `infer_masks`; of any other one the
    weights behind them are alive. Arguments and result as there.

    Raises:
        InputError: a layer's width does not divide into groups.
    """
    return {
        name: keep_mask_from_scores(weight.abs(), pattern)
        for name, weight in _block_weights(model, pattern, skip)
    }


def num_alive(model: nn.Module, masks: dict[str, torch.Tensor]) -> int:
    """Weights behind the masks that are not zero; arguments and errors as `mask_gradients`."""
    return sum(
        int(torch.count_nonzero(weight.detach().masked_fill(keep_mask.to(weight.device), 0)))
        for weight, keep_mask in _weights(model, masks)
    )


def _block_weights(
    model: nn.Module, pattern: Pattern, skip: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(full layer name, weight) of the block linears that are not skipped, widths checked."""
    prefix, blocks = find_blocks(model)
    for name, module in blocks.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear) and not any(fnmatchcase(name, glob) for glob in skip):
            weight = module.weight.detach()
            check_divides(name, weight.shape[1], pattern)
            yield name, weight


class _GradientMask:
    """Tensor hook that clears the gradient where the mask is False; holds the mask packed."""

    def __init__(self, keep_mask: torch.Tensor) -> None:
        self._shape = tuple(keep_mask.shape)
        self._packed = pack_mask(keep_mask)

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        if self._packed.device != grad.device:  # the engine moved the model after registration
            self._packed = self._packed.to(grad.device)
        # By bits, not multiplied: inf * 0 would put NaN where a zero belongs. Eight times as fast
        # on a CPU as filling: an element is kept by a word of ones, or cleared by one of zeros.
        dtype = _INTEGERS[grad.element_size()]
        bits = _spread(self._packed, grad.numel(), dtype, -1).view(self._shape)
        torch.bitwise_and(grad.view(dtype), bits, out=bits)
        return bits.view(grad.dtype)


def mask_gradients(model: nn.Module, masks: dict[str, torch.Tensor]) -> list[RemovableHandle]:
    """Make every backward pass give zero gradient at pruned weights.

    The hook runs before the gradient is accumulated, so pruned positions take no part in gradient
    norms, reductions or optimizer moments: under AdamW a weight that starts at zero with zero
    moments then stays exactly zero. Call it before a distributed engine takes the parameters over.

    Args:
        model: holds a module for every name in `masks`.
        masks: full layer name -> bool tensor of the weight's shape. Two names of one tied weight
            must have equal masks.

    Returns:
        One handle per distinct weight; `remove()` ends the masking.

    Raises:
        InputError: an unknown name, a mask of another shape, or tied weights with unequal masks.

    Cost: one bit of memory per weight; in backward, one gradient more at a time and two passes
    over it.
    """
    return [
        weight.register_hook(_GradientMask(keep_mask.to(weight.device)))
        for weight, keep_mask in _weights(model, masks)
    ]


def has_alive(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether any element that is pruned is not zero; NaN and infinity are not zero.

    Args:
        pairs: values of any float dtype and shape, and a bool tensor of their shape and device,
            True where pruned.

    Cost: one pass over both, many times as fast on a CPU as comparing, indexing or counting; the
    host waits once per device.
    """
    found: dict[torch.device, list[torch.Tensor]] = {}
    for values, pruned in pairs:
        if values.numel():
            alive = values.detach().bool().logical_and_(pruned).view(torch.uint8)
            found.setdefault(alive.device, []).append(alive.amax())
    return any(bool(torch.stack(flags).amax()) for flags in found.values())


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """Set every pruned weight to zero, in place; arguments and errors as `mask_gradients`."""
    for weight, keep_mask in _weights(model, masks):
        weight.masked_fill_(~keep_mask.to(weight.device), 0)


def require_masked(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """Check that every pruned weight is exactly zero.

    Raises:
        PatternViolationError: one is not; names the layer, row and column.
        InputError: as `mask_gradients`.
    """
    for (name, keep_mask), weight in zip(masks.items(), _targets(model, masks), strict=True):
        wrong = (weight.detach() != 0) & ~keep_mask.to(weight.device)
        if wrong.any():
            row, column = (int(i) for i in wrong.nonzero()[0])
            raise PatternViolationError(
                f"{name}: pruned weight at row {row}, column {column} is "
                f"{weight[row, column].item():.3e} instead of 0"
            )


def _targets(model: nn.Module, masks: dict[str, torch.Tensor]) -> list[nn.Parameter]:
    """The weight of every name in `masks`, shapes checked."""
    modules = dict(model.named_modules())
    weights = []
    for name, keep_mask in masks.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise InputError(
                f"mask of layer {name}: the model has no such layer; masks and model are of "
                "different runs"
            )
        if weight.shape != keep_mask.shape:
            raise InputError(
                f"mask of layer {name}: shape {tuple(keep_mask.shape)}, the weight has "
                f"{tuple(weight.shape)}; masks and model are of different runs"
            )
        weights.append(weight)
    return weights


def layer_weights(model: nn.Module, masks: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """The weight of every layer in `masks`; errors as `mask_gradients`."""
    return dict(zip(masks, _targets(model, masks), strict=True))


def _weights(
    model: nn.Module, masks: dict[str, torch.Tensor]
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Every distinct weight once, with its mask."""
    first: dict[int, str] = {}
    pairs = []
    for name, weight in zip(masks, _targets(model, masks), strict=True):
        other = first.setdefault(id(weight), name)
        if other == name:
            pairs.append((weight, masks[name]))
        elif not torch.equal(masks[other].cpu(), masks[name].cpu()):
            raise InputError(
                f"masks of layers {other} and {name}: the layers share one weight but the masks "
                "differ; give both the same mask"
            )
    return pairs
