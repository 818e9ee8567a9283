"""Zeros stay zero while DeepSpeed trains: masks on gradients, masters and moments, proven again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from jobs.training import zero_state
from jobs.training.zero_state import WEIGHTS, Part, masters, param_numel, slice_start
from sparsify.errors import PatternViolationError
from sparsify.masks.storage import BitMasks, mask_from_bits
from sparsify.models.masked import clear_pruned_, has_alive


class MaskGuard:
    """Holds pruned weights at zero in the weights, the fp32 masters and both Adam moments.

    Gradients are masked once a step, here, or in every backward pass by hooks
    (`sparsify.models.masked.mask_gradients`), so the proof should never find anything: AdamW leaves
    a weight with zero gradient and zero moments at exactly zero. It is made after every step, on
    the parts of the copies that this rank holds. The guard keeps the bits of those parts beside
    them, and unpacks one at a time.

    Args:
        engine: of the student.
        masks: of its layers.
        at_step: whether gradients are masked here (`zero.masks_at_step`).
    """

    def __init__(self, engine: Any, masks: BitMasks, at_step: bool = True) -> None:
        self._engine, self._at_step = engine, at_step
        named = dict(engine.module.named_parameters())
        self._weights = {name: named[f"{name}.weight"] for name in masks}
        self._bits_of: dict[str, torch.Tensor] = {}
        self._parts: dict[Part, torch.Tensor] = {}
        self.set_masks(masks)

    def set_masks(self, masks: BitMasks) -> None:
        """Hold other masks of the same layers from here on."""
        self._bits_of, self._parts = masks.bits, {}

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the pruned elements of the step's gradient, before the engine's step, unless hooks
        have.

        The sum over micro batches and workers is one of numbers without their pruned elements, as
        if each had been masked by itself.

        Cost: two passes over this rank's part, once a step.
        """
        if not self._at_step:
            return
        layers = {id(param): layer for layer, param in self._weights.items()}
        for param, values, start in zero_state.gradients(self._engine, self._weights.values()):
            stop = min(start + values.numel(), param_numel(param))
            if stop > start:  # else this rank has padding alone
                bits = self._part_bits((layers[id(param)], values.device, start, stop))
                clear_pruned_(values[: stop - start], bits, start % 8)

    def check(self) -> None:
        """Look at every copy.

        Raises:
            PatternViolationError: a pruned element is not zero; names layer and copy.
        """
        # Multiplying by 0 would hide NaN; this does not.
        if not has_alive((values, pruned) for _, _, values, pruned in self._copies()):
            return
        for layer, copy, values, pruned in self._copies():
            num_alive = int(torch.count_nonzero(values[pruned]))
            if num_alive:
                raise PatternViolationError(
                    f"distill: {num_alive} pruned elements of {layer} are not zero in the {copy}; "
                    "the mask was not held and the step cannot be trusted"
                )

    def clear(self) -> None:
        """Zero the pruned elements of every copy: once, before the first step."""
        with torch.no_grad():
            for _, _, values, pruned in self._copies():
                values.masked_fill_(pruned, 0.0)

    def _copies(self) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
        """(layer, copy name, flat values on this rank, flat bool True where pruned)."""
        for layer, param in self._weights.items():
            numel = param_numel(param)
            found: dict[Part, torch.Tensor] = {}
            for copy, values, start in _local_copies(self._engine, param):
                # Only the bits of this rank's slice, once for all copies of it.
                part = (layer, values.device, start, min(start + values.numel(), numel))
                if part not in found:
                    found[part] = _pruned(self._part_bits(part), *part[2:])
                yield layer, copy, values[: len(found[part])], found[part]

    def _part_bits(self, part: Part) -> torch.Tensor:
        """The bytes of a layer's mask that hold a part of it."""
        layer, device, start, stop = part
        if part not in self._parts:
            self._parts[part] = self._bits_of[layer][start // 8 : -(-stop // 8)].to(device)
        return self._parts[part]


def _pruned(bits: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Flat bool: the elements of a mask from `start` to `stop` that are pruned.

    Args:
        bits: of the mask, from the byte on that holds element `start`.
        start, stop: elements of the mask.
    """
    first = start // 8 * 8
    keep = mask_from_bits(bits, (max(0, min(8 * len(bits), stop - first)),))
    return ~keep[start - first :]


def _local_copies(engine: Any, param: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(what it is called, flat view, offset of its first element) of all that this rank holds."""
    if hasattr(param, "ds_tensor"):  # ZeRO-3: every rank holds one slice of every parameter
        yield "weights", param.ds_tensor.data.view(-1), slice_start(param)
    else:
        yield "weights", param.data.view(-1), 0
    for copy, values, start in masters(engine, param):
        if copy != WEIGHTS:
            yield copy, values, start
        elif values.data_ptr() != param.data.data_ptr():
            yield "fp32 master", values, start
