"""Which layers are pruned, and what their solver asks of the walk and is handed by it.

Shape suffixes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from sparsify.calibration.accumulate import TargetShares
from sparsify.calibration.moments import InputMoments
from sparsify.errors import InputError
from sparsify.models.structure import find_blocks, linears_of, routers_of

InputOrder = Literal["layer", "block", "dense"]


@dataclass
class Layer:
    """One linear layer, as handed to the solver."""

    name: str
    """full dotted name, without ".weight\""""
    module: nn.Linear
    block: int
    """index of the decoder block"""
    moments: InputMoments
    """moments of its input; layers that share an input share them"""
    wanted_OI: Tensor | None = None
    """float32 mean of (a W y + b (r_dense - r)) x^T for a layer that adds to a residual stream r: W
    is its dense weight, y its input in the dense model, x its own, a and b are the shares asked
    for; None if they were not, if the layer adds to none, or where `cross_II` has no pairs"""


@dataclass(frozen=True)
class SolverNeeds:
    """What a solver needs of the walk."""

    teacher: bool = False
    """follow the dense model too, for `cross_II`"""
    target_shares: TargetShares | None = None
    """with a teacher: `wanted_OI` of layers that write to the residual stream, with these shares.
    Their moments have no `cross_II` then, unless another kind of layer shares them"""
    factor_damping: float | None = None
    """compute the factors with this damping, each on one process, before handing out the layers"""
    order: InputOrder = "block"
    """layer: measure a layer's input when the layers before it are solved; block: when the blocks
    before it are; dense: as it is in the dense model, without a teacher. Where layer is asked for,
    blocks that are not `groups.LayerGroups.is_in_order` are measured in the order block"""
    token_weights: Tensor | None = None
    """float32 (blocks, N, T), how much each token of the N rows counts; None: all the same"""

    @property
    def has_dense_outputs(self) -> bool:
        """Whether layers that write to the residual stream aim at the dense model's outputs."""
        return self.target_shares is not None and self.target_shares.teacher > 0


def passes_ahead(order: InputOrder, has_teacher: bool) -> bool:
    """Whether the dense model can pass blocks that the walk has not come to: it is followed, and
    not beside the pruned one."""
    return order == ("layer" if has_teacher else "dense")


def prunable_linears(
    model: nn.Module, skip: Sequence[str] = (), option: str = "prune.skip"
) -> list[tuple[int, str, nn.Linear]]:
    """(block index, full name, module) of every linear in the decoder blocks, less the skipped.

    Args:
        model: a transformers decoder.
        skip: glob patterns (`*`, `?`, `[...]`) of full or block-relative names to leave dense.
        option: that they come from, for messages.

    Raises:
        InputError: a glob pattern matches nothing, or nothing is left to prune.
    """
    list_name, blocks = find_blocks(model)
    found: list[tuple[int, str, nn.Linear]] = []
    unused = set(skip)
    for index, block in enumerate(blocks):
        for relative, module in linears_of(block).items():
            name = f"{list_name}.{index}.{relative}"
            hits = {glob for glob in skip if fnmatchcase(name, glob) or fnmatchcase(relative, glob)}
            unused -= hits
            if not hits:
                found.append((index, name, module))
        if unused:  # who names a router gets what is the case anyway
            routers = [name for n in routers_of(block) for name in (n, f"{list_name}.{index}.{n}")]
            unused -= {glob for glob in unused if any(fnmatchcase(n, glob) for n in routers)}
    if unused:
        raise InputError(
            f"{option}: {', '.join(sorted(unused))} matches no linear layer; names look like "
            f"{list_name}.0.{next(iter(linears_of(blocks[0])))}"
        )
    if not found:
        raise InputError(f"{option}: every linear layer is skipped, so nothing is left to do")
    return found


def skipped_linears(model: nn.Module, skip: Sequence[str], option: str = "prune.skip") -> set[str]:
    """Full names of the linears in the decoder blocks that `prunable_linears` leaves out."""
    every = {name for _, name, _ in prunable_linears(model)}
    return every - {name for _, name, _ in prunable_linears(model, skip, option)}
