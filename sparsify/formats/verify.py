"""The exact pattern check on files: what was written is what is checked, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import InputError, PatternViolationError
from sparsify.formats.sparse_folder import MASKS, read_sparsity
from sparsify.masks.select import require_pattern
from sparsify.masks.storage import BitMasks, load_masks, mask_digest
from sparsify.models.blocks import layer_places
from sparsify.models.masked import infer_masks
from sparsify.packed.folder import PackedFolder, open_packed
from sparsify.pattern import Pattern

_COUNTS = (
    "num_layers", "num_weights", "num_zeros", "num_violations", "num_model_weights",
    "num_model_zeros",
)  # fmt: skip


def check_files(
    folder: Path, masks: Mapping[str, torch.Tensor], pattern: Pattern
) -> dict[str, int]:
    """Check every masked weight in a model folder's safetensors files.

    Args:
        folder: model folder.
        masks: layer name -> bool keep mask (O, I).
        pattern: what every masked layer must satisfy.

    Returns:
        Counts: layers and weights checked, zeros among them, and violations (always 0 here); and
        weights and zeros of all tensors, so that what stayed dense counts too.

    Raises:
        PatternViolationError: a pruned weight is not exactly zero, or a group is too full; names
            the layer.
        InputError: a masked layer is in no file.

    Cost: reads the files once, a tensor in memory at a time.
    """
    weights = ((name, place.read(None)) for name, place in layer_places(folder))
    return check_weights(weights, folder, masks, pattern)


def check_packed(folder: Path) -> dict[str, int]:
    """`check_files` for a packed folder: what it unpacks to, and the masks that its positions say,
    which are those of its sparsity.json. Every tensor is compared with its hash."""
    packed = PackedFolder(folder)
    masks = PackedMasks(packed)
    recorded = (read_sparsity(folder) or {}).get("layers", {})
    for name, mask in masks.items():
        if name in recorded and recorded[name]["keep_mask_sha256"] != mask_digest(mask):
            raise InputError(
                f"{folder}: positions of layer {name} are not the mask of its sparsity.json; "
                "export the model again"
            )
    weights = ((name, packed.dense(name)) for name in packed.shapes())
    return check_weights(weights, folder, masks, packed.contents.pattern)


class PackedMasks(Mapping[str, torch.Tensor]):
    """The keep masks of a packed folder's layers, from their positions."""

    def __init__(self, folder: PackedFolder) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._folder.keep_mask(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._folder.contents.layers))

    def __len__(self) -> int:
        return len(self._folder.contents.layers)


def check_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    masks: Mapping[str, torch.Tensor],
    pattern: Pattern,
) -> dict[str, int]:
    """`check_files` for (name, dense tensor) of a folder that stores them in another way."""
    left = set(masks)
    counts = dict.fromkeys(_COUNTS, 0)
    for name, weight in weights:
        num_zeros = weight.numel() - int(weight.count_nonzero())
        if weight.is_floating_point():
            counts["num_model_weights"] += weight.numel()
            counts["num_model_zeros"] += num_zeros
        layer = name.removesuffix(".weight")
        if layer not in left:
            continue
        left.remove(layer)
        check_weight(layer, weight, masks[layer], pattern)
        counts["num_layers"] += 1
        counts["num_weights"] += weight.numel()
        counts["num_zeros"] += num_zeros
    if left:
        raise InputError(f"{folder}: no weight of layer {min(left)} in its files")
    return counts


def check_weight(
    layer: str, weight: torch.Tensor, keep_mask: torch.Tensor, pattern: Pattern
) -> None:
    """PatternViolationError unless weight and mask fit the pattern, and pruned weights are zero."""
    alive = (weight != 0) & ~keep_mask
    if alive.any():
        row, column = alive.nonzero()[0].tolist()
        raise PatternViolationError(
            f"{layer}: {int(alive.sum())} pruned weights are not zero, the first at row {row}, "
            f"column {column}"
        )
    require_pattern([(layer, keep_mask)], pattern)
    require_pattern([(layer, weight)], pattern)


def masks_of(
    folder: Path, model: Any = None, pattern: str | None = None, skip: Sequence[str] = (),
    may_be_dense: bool = False,
) -> tuple[BitMasks, Pattern]:  # fmt: skip
    """Masks and pattern of a sparse model folder.

    They come from the folder's own files; a model that was pruned elsewhere has neither, and its
    masks are read from the zeros of `model`, which must fit `pattern` exactly except in
    the layers that match `skip`; or where it may be dense, from its largest weights.
    """
    masks, own_pattern = own_masks(folder, pattern)
    if masks is None:
        masks = infer_masks(model, own_pattern, skip, may_be_dense)
    return masks, own_pattern


def own_masks(folder: Path, pattern: str | None = None) -> tuple[BitMasks | None, Pattern]:
    """The masks that the folder of a sparse model holds, None if it holds none; the pattern.

    `pattern` is that of a folder which does not describe itself.
    """
    if (packed := open_packed(folder)) is not None:
        return BitMasks.of(PackedMasks(packed)), packed.contents.pattern
    sparsity = read_sparsity(folder)
    if sparsity is None:
        assert pattern is not None, "a stage's own folder describes itself"
        sparsity = {"pattern": pattern}
    found = Pattern.parse(sparsity["pattern"])
    return load_masks(folder / MASKS) if (folder / MASKS).is_file() else None, found
