"""Keep-masks as a hold on weights: read from them, put on them, kept on while they train.

Pruned weights are exactly zero, and stay so because their gradients are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import InputError
from sparsify.masks.select import find_violation, keep_mask_from_scores
from sparsify.masks.storage import BitMasks, mask_to_bits, spread
from sparsify.models.structure import find_blocks, linears_of
from sparsify.pattern import Pattern, check_divides

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def infer_masks(
    model: nn.Module, pattern: Pattern, skip: Sequence[str] = (), may_be_dense: bool = False
) -> BitMasks:
    """The masks of a model that was pruned elsewhere, from the zeros in its block linears.

    Every non-zero weight is kept. Where a group has more zeros than the pattern asks for, the
    surplus zeros are kept too, lowest column first, so that every mask has exactly the pattern's
    count and a weight that is zero by chance can still train. Unstructured zeros are taken as
    they are: they may be unevenly spread over rows, and more than were asked for.

    Args:
        model: a model whose blocks `sparsify.models.structure.find_blocks` finds.
        pattern: what every linear layer of the blocks must satisfy.
        skip: glob patterns of full layer names that were left dense.
        may_be_dense: take the largest |W| of every group (or row) of a layer that does not satisfy
            the pattern; the weights under its mask are alive.

    Returns:
        Full layer name (without ".weight") -> bool tensor of the weight's shape.

    Raises:
        InputError: a layer does not satisfy the pattern; names layer, row and column. Or its width
            does not divide into groups.
    """
    name, blocks = find_blocks(model)
    return BitMasks.of(infer_block_masks(name, blocks, pattern, skip, may_be_dense))


def infer_block_masks(
    prefix: str, block: nn.Module, pattern: Pattern, skip: Sequence[str] = (),
    may_be_dense: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """`infer_masks` of a part of the model, whose full name is `prefix`."""
    masks = {}
    for inner, module in linears_of(block).items():
        name = f"{prefix}.{inner}"
        if not any(fnmatchcase(name, glob) for glob in skip):
            masks[name] = infer_weight_mask(name, module.weight.detach(), pattern, may_be_dense)
    return masks


def infer_weight_mask(
    name: str, weight: torch.Tensor, pattern: Pattern, may_be_dense: bool = False
) -> torch.Tensor:
    """`infer_masks` of the layer `name` with this weight."""
    check_divides(name, weight.shape[1], pattern)
    violation = None if may_be_dense else find_violation(weight, pattern)
    if violation is not None:
        row, column = violation
        share = 1 - int(weight.count_nonzero()) / weight.numel()
        group = f"group {column // pattern.m}, " if pattern.is_structured else ""
        raise InputError(
            f"{name}: not pruned to {pattern} ({share:.2%} of it are zeros; row {row}, {group}from "
            f"column {column}: too many non-zero weights); prune the model first, skip this "
            "layer, or let masks move from dense weights (distill.moving_share)"
        )
    as_they_are = not pattern.is_structured and not may_be_dense
    return weight != 0 if as_they_are else keep_mask_from_scores(weight.abs(), pattern)


def num_alive(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> int:
    """Weights under the masks that are not zero; arguments and errors as `mask_gradients`."""
    return sum(
        int(torch.count_nonzero(weight.detach().masked_fill(keep_mask.to(weight.device), 0)))
        for weight, keep_mask in _weights(model, masks)
    )


class _GradientMask:
    """Tensor hook that clears the gradient where the mask is False; holds the mask bits."""

    def __init__(self, keep_mask: torch.Tensor) -> None:
        self._shape = tuple(keep_mask.shape)
        self._bits = mask_to_bits(keep_mask)

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        if self._bits.device != grad.device:  # the engine moved the model after registration
            self._bits = self._bits.to(grad.device)
        dtype, words = _words(self._bits, grad, 0)
        words = words.view(self._shape)
        torch.bitwise_and(grad.view(dtype), words, out=words)
        return words.view(grad.dtype)


def _words(
    bits: torch.Tensor, values: torch.Tensor, first: int
) -> tuple[torch.dtype, torch.Tensor]:
    """The integers that `values` are taken for, and one for each: of ones to keep it, of zeros.

    By bits, not multiplied: inf * 0 would put NaN where a zero belongs. Eight times as fast on a
    CPU as filling.
    """
    dtype = _INTEGERS[values.element_size()]
    return dtype, spread(bits, first + values.numel(), dtype, -1)[first:]


def clear_pruned_(values: torch.Tensor, bits: torch.Tensor, first: int = 0) -> None:
    """Set the pruned elements of a flat piece of a tensor to zero, NaN and infinity too, in place.

    Args:
        values: (n,) of any float dtype.
        bits: uint8, of the mask, on the same device.
        first: which bit is that of the first element; below 8 where `bits` begin at its byte.

    Cost: two passes over the piece, and memory for a second one.
    """
    dtype, words = _words(bits, values, first)
    values.view(dtype).bitwise_and_(words)


def mask_gradients(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> list[RemovableHandle]:
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
def apply_masks_(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set every pruned weight to zero, in place; arguments and errors as `mask_gradients`."""
    for weight, keep_mask in _weights(model, masks):
        weight.masked_fill_(~keep_mask.to(weight.device), 0)


def _targets(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> list[nn.Parameter]:
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


def layer_weights(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """The weight of every layer in `masks`; errors as `mask_gradients`."""
    return dict(zip(masks, _targets(model, masks), strict=True))


def _weights(
    model: nn.Module, masks: Mapping[str, torch.Tensor]
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
