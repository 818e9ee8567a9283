"""Layers of a mixture's experts that are factored and solved together, as a stack.

An expert's layers are small, and on a GPU it takes longer to start what is done with one of them
than to do it. A hundred experts as a stack take the launches of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsify.calibration.accumulate import BlockMoments
from sparsify.calibration.block import LoadedBlock
from sparsify.calibration.layers import Layer
from sparsify.models.experts import expert_layers, num_stacks

_ALONE = ("cpu",)  # types of devices where a launch costs next to nothing


def stacks_of(groups: Sequence[list[str]], loaded: LoadedBlock) -> list[list[list[str]]]:
    """Put groups of layers together where they are those of experts, of one kind and shape.

    `experts.num_stacks` says how many stacks they make, from shapes alone, never from the memory
    that is free or the number of processes, since a stack's products may have other bits on a GPU
    than those of its layers one by one. On a CPU every group is by itself.

    Args:
        groups: layers that share an input, by their names relative to the block.
        loaded: the block.

    Returns:
        Stacks in the order of their first groups, whose layers are as many and in the same order.
    """
    known, layers = expert_layers(loaded.block), loaded.layers
    alike: dict[object, list[list[str]]] = {}
    for group in groups:
        weights = [layers[name].weight for name in group]
        key: object = group[0]
        if weights[0].device.type not in _ALONE and all(name in known for name in group):
            kinds = tuple(known[name].kind for name in group)
            key = kinds, tuple((weight.shape, weight.dtype) for weight in weights)
        alike.setdefault(key, []).append(group)
    stacks = []
    for found in alike.values():
        rows = max(layers[name].out_features for name in found[0])
        num = num_stacks(len(found), rows, layers[found[0][0]].in_features)
        edges = [index * len(found) // num for index in range(num + 1)]
        stacks += [found[start:stop] for start, stop in itertools.pairwise(edges)]
    return stacks


def layers_of(
    stack: list[list[str]], loaded: LoadedBlock, found: BlockMoments, prefix: str
) -> Iterator[list[Layer]]:
    """The layers of a stack that are solved at once: those at one place of each group.

    Args:
        stack: of `stacks_of`.
        loaded: the block.
        found: the moments of its inputs.
        prefix: of the layers' full names.
    """
    for names in zip(*stack, strict=True):
        yield [
            Layer(
                f"{prefix}{name}", loaded.layers[name], loaded.index, found.moments[group[0]],
                found.wanted.get(name),
            )
            for name, group in zip(names, stack, strict=True)
        ]  # fmt: skip


def as_stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of several layers with a dimension before; that of one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))
