"""What an export is made from: a sparse model's tensors and masks, one at a time.

From the files of a checkpoint, so that memory does not grow with the model; from a model in memory
where there is one, or where the files name tensors otherwise than its layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from sparsify.errors import InputError
from sparsify.formats.sparse_folder import MASKS, read_sparsity
from sparsify.formats.verify import PackedMasks
from sparsify.masks.storage import MaskFile
from sparsify.models.blocks import open_stored
from sparsify.models.layout import layout_of
from sparsify.models.load import (
    DTYPES,
    check_checkpoint,
    load_model,
    open_encoded,
    read_config,
    stored_places,
)
from sparsify.models.masked import infer_weight_mask
from sparsify.models.stored import Place, not_finite, num_not_finite, own_places
from sparsify.models.structure import find_blocks, linears_of
from sparsify.packed.folder import open_packed
from sparsify.pattern import Pattern

if TYPE_CHECKING:  # 3.4 s, for which nothing here asks before there is a model
    from transformers import PreTrainedModel


class Source:
    """A model's tensors by the names that go into files, experts that are stored fused layer by
    layer.

    Args:
        model: with its configuration; weights count only where there is nothing else to read.
        places: where the tensors are stored; None: in the model itself.
        dtype: that weights are cast to; None: as they are stored.
        folder: where the model comes from, for messages and for what is copied.
    """

    def __init__(
        self, model: PreTrainedModel, places: Mapping[str, Place] | None,
        dtype: torch.dtype | None, folder: Path,
    ) -> None:  # fmt: skip
        self.model = model
        self.folder = folder
        self._places = places
        self._held = _state_of(model) if places is None else {}
        self._dtype = dtype
        plan = {} if dtype is None else model._get_dtype_plan(dtype)
        self._keeps_float32 = [re.compile(rf"(^|\.){pattern}(\.|$)") for pattern in plan]

    def names(self) -> list[str]:
        """Names of all tensors, block after block."""
        return sorted(self._held if self._places is None else self._places, key=in_order)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._held[name].shape if self._places is None else self._places[name].shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU.

        Raises:
            InputError: a value is NaN, or infinite in its dtype.
        """
        dtype = self._dtype
        if any(pattern.search(name) for pattern in self._keeps_float32):
            dtype = None
        if self._places is None:
            found = self._held[name].detach().cpu()
            found = found.to(dtype) if dtype and found.is_floating_point() else found
        else:
            found = self._places[name].read(dtype)
        if found.is_floating_point() and (num_bad := num_not_finite(found)):
            raise not_finite(self.folder, name, num_bad, found.numel(), found.dtype)
        return found

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors as the family's checkpoints have them, block after block; errors as `tensor`.

        Cost: one in memory at a time, of experts that are stored fused those of a block.
        """
        return layout_of(self.model).joined((name, self.tensor(name)) for name in self.names())

    @property
    def dtype_name(self) -> str:
        """Of the weights, by the configuration that is written."""
        dtype = self._dtype or self.model.config.dtype or torch.float32
        return str(dtype).removeprefix("torch.")

    def save_config(self, folder: Path, quantization: dict[str, Any] | None = None) -> None:
        """Write config.json and generation_config.json.

        Args:
            folder: where to.
            quantization: the `quantization_config`; None for a model that has none.
        """
        config = self.model.config
        config.architectures = [type(self.model).__name__]
        if self._dtype is not None:
            config.dtype = self._dtype
        if quantization is not None:
            config.quantization_config = quantization
        try:
            config.save_pretrained(folder)
        finally:
            if quantization is not None:
                del config.quantization_config
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)


def open_source(folder: Path, dtype: str | None) -> Source:
    """The source of a model folder, dense or packed.

    Args:
        folder: a checked model folder, or one that will be.
        dtype: that weights are cast to; None: as they are stored.

    Raises:
        InputError: see `models.load.check_checkpoint`.

    Cost: reads headers. Where layers are not in the files under their own names (a family whose
    weights transformers renames or merges while it loads), the whole model is held in memory.
    """
    check_checkpoint(folder)
    packed = open_encoded(folder)
    kind = dtype or _stored_dtype(folder)
    model, stored, reason = open_stored(folder, kind)
    cast = DTYPES[kind] if dtype is not None or packed is not None else None
    if reason is None:
        return Source(model, stored.places, cast, folder)
    list_name, blocks = find_blocks(model)
    wanted = {
        f"{list_name}.{index}.{name}.weight": tuple(layer.weight.shape)
        for index, block in enumerate(blocks)
        for name, layer in linears_of(block).items()
    }
    raw = dict(own_places(stored_places(folder), layout_of(model)))
    if all(name in raw and raw[name].shape == shape for name, shape in wanted.items()):
        return Source(model, raw, cast, folder)
    return Source(load_model(folder, kind), None, cast, folder)


def masks_of_source(
    source: Source, pattern: str | None = None, skip: Sequence[str] = ()
) -> tuple[Mapping[str, Tensor], Pattern]:
    """Keep masks of a sparse model, each read when it is asked for, and their pattern.

    They are the folder's own; those of a packed one are its positions; those of a model that was
    pruned elsewhere come from its zeros, which must fit `pattern` except in the layers that match
    `skip`.
    """
    sparsity = read_sparsity(source.folder)
    packed = open_packed(source.folder)
    if packed is not None:
        return PackedMasks(packed), packed.contents.pattern
    if sparsity is not None:
        pattern = sparsity["pattern"]
    if pattern is None:
        raise InputError(f"{source.folder}: says no pattern; name it with prune.pattern")
    parsed = Pattern.parse(pattern)
    if (source.folder / MASKS).is_file():
        return MaskFile(source.folder / MASKS), parsed
    return _InferredMasks(source, parsed, skip), parsed


class _InferredMasks(Mapping[str, Tensor]):
    """Masks from the zeros of a model that has none of its own."""

    def __init__(self, source: Source, pattern: Pattern, skip: Sequence[str]) -> None:
        list_name, blocks = find_blocks(source.model)
        names = (
            f"{list_name}.{index}.{name}"
            for index, block in enumerate(blocks)
            for name in linears_of(block)
        )
        self._names = [n for n in names if not any(fnmatchcase(n, glob) for glob in skip)]
        self._source, self._pattern = source, pattern

    def __getitem__(self, name: str) -> Tensor:
        return infer_weight_mask(name, self._source.tensor(f"{name}.weight"), self._pattern)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _stored_dtype(folder: Path) -> str:
    """Type of the weights in a model folder, as its configuration says."""
    dtype = read_config(folder).dtype
    return str(dtype or "float32").removeprefix("torch.")


def _state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors under the names that the family's checkpoints have, tied ones once; under
    those of its modules where a layer would not be found otherwise."""
    state = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    for target, source in model.all_tied_weights_keys.items():
        ends = state.get(target), state.get(source)
        if ends[0] is not None and ends[1] is not None and _is_same(ends[0], ends[1]):
            del state[target]
    stored = dict(revert_weight_conversion(model, state))
    list_name, blocks = find_blocks(model)
    wanted = {
        f"{list_name}.{index}.{name}.weight"
        for index, block in enumerate(blocks)
        for name in linears_of(block)
    }
    return stored if wanted <= stored.keys() else state


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr()


def in_order(name: str) -> list[tuple[int, int | str]]:
    """Sorts layer 10 after layer 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
