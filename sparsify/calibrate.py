"""The walk over a model's decoder blocks: statistics of each linear's input, then a solver.

Blocks are visited in order. A block's Hessians come from one pass over the calibration rows; the
caller's solver then changes the block's weights, and the block runs again, so that the next block
is calibrated on what it will really receive. Processes share the rows. Shape suffixes: N rows,
T tokens of a row, B rows of a batch, D hidden size, I input features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparsify.comm import Comm
from sparsify.errors import CalibrationError, InputError, NonFiniteError, SingularHessianError
from sparsify.hessian import HessianSum
from sparsify.models.structure import (
    BlockInputs,
    capture_block_calls,
    capture_block_inputs,
    find_blocks,
    linears_of,
    run_block,
    shared_input_groups,
    watch_linears,
)


@dataclass
class Layer:
    """One linear layer, as handed to the solver."""

    name: str
    """full dotted name, without ".weight\""""
    module: nn.Linear
    block: int
    """index of the decoder block"""
    hessian_II: Tensor | None
    """float32 mean of x x^T over all processes' tokens; layers that share an input share it"""
    num_tokens: int
    """calibration tokens behind the Hessian, over all processes; 0 without one"""
    cross_II: Tensor | None = None
    """float32 mean of y x^T over the same tokens, y being what the layer received in the model as
    it was before the walk changed anything; None unless the walk was asked for it"""


def prunable_linears(
    model: nn.Module, skip: Sequence[str] = ()
) -> list[tuple[int, str, nn.Linear]]:
    """(block index, full name, module) of every linear in the decoder blocks, less the skipped.

    Args:
        model: a transformers decoder.
        skip: glob patterns (`*`, `?`, `[...]`) of full or block-relative names to leave dense.

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
    if unused:
        raise InputError(
            f"prune.skip: {', '.join(sorted(unused))} matches no linear layer; names look like "
            f"{list_name}.0.{next(iter(linears_of(blocks[0])))}"
        )
    if not found:
        raise InputError("prune.skip: every linear layer is skipped, so nothing is left to prune")
    return found


def walk_blocks(
    model: nn.Module,
    rows: Tensor,
    solve: Callable[[Layer], None],
    *,
    comm: Comm,
    batch_size: int,
    needs_hessian: bool,
    skip: Sequence[str] = (),
    on_block: Callable[[int, int], None] | None = None,
    needs_cross: bool = False,
) -> None:
    """Hand every linear layer of every decoder block to `solve`, with its statistics.

    Args:
        model: a transformers decoder; its weights change as `solve` changes them.
        rows: int64 token ids (N, T) without padding, the same on all processes; process r takes
            rows r, r + world_size, ...
        solve: called once per layer, in the same order on all processes; sets
            `layer.module.weight.data` in place, to the same values on all processes.
        comm: the processes that take part.
        batch_size: rows per forward of a block.
        needs_hessian: False hands out layers without statistics and runs no forward at all.
        skip: see `prunable_linears`.
        on_block: called as on_block(blocks done, blocks in all) after each block.
        needs_cross: also run the model as it is now beside the changing one, and give layers
            their `cross_II`; needs Hessians.

    Raises:
        InputError: see `models.structure`.
        CalibrationError: rows of the wrong shape, or fewer rows than processes.
        NonFiniteError: activations hold NaN or infinity; names the layer.
        SingularHessianError: as raised by `solve`, with the number of tokens added.

    Cost: two forwards of every block over the rows; hidden states of this process's rows and the
    Hessians of one block in memory. `needs_cross` doubles all of it and copies one block.
    """
    linears = prunable_linears(model, skip)
    list_name, blocks = find_blocks(model)
    batches = _share_of(rows, comm, batch_size) if needs_hessian else []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            inputs = capture_block_inputs(model, blocks, batches)
            calls = {len(b): capture_block_calls(model, blocks, b) for b in _one_per_size(batches)}
            before = list(inputs) if needs_cross else []
            for index, block in enumerate(blocks):
                names = {name: module for at, name, module in linears if at == index}
                inputs = [_call_of(index, call, calls) for call in inputs]
                before = [_call_of(index, call, calls) for call in before]
                unchanged = copy.deepcopy(block) if before else block
                streams = _Streams(block, inputs, unchanged, before)
                for layer in _layers_of(streams, index, f"{list_name}.{index}.", names, comm):
                    _solve_layer(layer, solve)
                if on_block is not None:
                    on_block(index + 1, len(blocks))
                if index + 1 < len(blocks):
                    inputs = _through(block, inputs)
                    before = _through(unchanged, before)
    finally:
        model.train(was_training)


def _share_of(rows: Tensor, comm: Comm, batch_size: int) -> list[Tensor]:
    """This process's rows, in batches."""
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise CalibrationError(
            f"calibration rows have shape {tuple(rows.shape)}; expected (rows, tokens)"
        )
    if len(rows) < comm.world_size:
        raise CalibrationError(
            f"{len(rows)} calibration rows for {comm.world_size} workers: each needs at least one; "
            "raise prune.num_samples, or use fewer workers"
        )
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: must be at least 1")
    return list(rows[comm.rank :: comm.world_size].split(batch_size))


def _one_per_size(batches: list[Tensor]) -> list[Tensor]:
    """One batch of each number of rows (the last batch may be smaller than the others)."""
    return list({len(batch): batch for batch in batches}.values())


def _call_of(index: int, call: BlockInputs, calls: dict[int, list[BlockInputs]]) -> BlockInputs:
    """`call` with the arguments that block `index` takes beside the hidden states.

    The first block's arguments were captured batch by batch and stay.
    """
    if index == 0:
        return call
    example = calls[len(call.hidden_BTD)][index]
    return BlockInputs(call.hidden_BTD, example.args, example.kwargs)


@dataclass(frozen=True)
class _Streams:
    """A block with its calls, and the block as it was with the calls of the unchanged model."""

    block: nn.Module
    inputs: list[BlockInputs]
    unchanged: nn.Module
    before: list[BlockInputs]
    """empty when no cross moments are wanted"""


def _through(block: nn.Module, inputs: list[BlockInputs]) -> list[BlockInputs]:
    """The same calls with the hidden states that the block makes of them."""
    return [BlockInputs(run_block(block, call), call.args, call.kwargs) for call in inputs]


def _layers_of(
    streams: _Streams, index: int, prefix: str, names: dict[str, nn.Linear], comm: Comm
) -> list[Layer]:
    """The block's layers with their Hessians, one per distinct input, summed over processes."""
    block, inputs = streams.block, streams.inputs
    if not names:
        return []
    if not inputs:
        return [Layer(name, module, index, None, 0) for name, module in names.items()]
    leave_out = [name for name in linears_of(block) if prefix + name not in names]
    groups = shared_input_groups(block, inputs[0], leave_out)
    # The first member of a group is watched; the others see the same tensor.
    watched = {group[0]: names[prefix + group[0]] for group in groups}
    sums = {
        name: HessianSum(module.in_features, module.weight.device)
        for name, module in watched.items()
    }
    crosses = _accumulate_(sums, streams, watched)
    layers = []
    for group in groups:
        total = sums.pop(group[0])
        total.reduce(comm)
        try:
            hessian_II = total.mean()
        except (NonFiniteError, CalibrationError) as error:
            raise type(error)(f"block {index}, layer {prefix}{group[0]}: {error}") from error
        cross_II = crosses.pop(group[0], None)
        if cross_II is not None:
            comm.all_reduce_(cross_II)
            cross_II /= total.num_tokens
        layers += [
            Layer(
                prefix + name, names[prefix + name], index, hessian_II, total.num_tokens, cross_II
            )
            for name in group
        ]
    return layers


def _accumulate_(
    sums: dict[str, HessianSum], streams: _Streams, watched: dict[str, nn.Linear]
) -> dict[str, Tensor]:
    """Add all tokens of this process to `sums`; returns the sums of y x^T, if there are any y."""
    if not streams.before:
        with watch_linears(watched, lambda name, value: sums[name].add(value)):
            _through(streams.block, streams.inputs)
        return {}
    crosses: dict[str, Tensor] = {}
    then: dict[str, Tensor] = {}

    def note(name: str, value: Tensor) -> None:
        sums[name].add(value)
        x_TI, y_TI = (v.detach().flatten(0, -2).float() for v in (value, then.pop(name)))
        if name not in crosses:
            crosses[name] = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1])
        crosses[name].addmm_(y_TI.T, x_TI)

    linears = linears_of(streams.unchanged)
    counterparts = {name: linears[name] for name in watched}
    for call, call_before in zip(streams.inputs, streams.before, strict=True):
        with watch_linears(counterparts, then.__setitem__):
            run_block(streams.unchanged, call_before)
        with watch_linears(watched, note):
            run_block(streams.block, call)
    return crosses


def _solve_layer(layer: Layer, solve: Callable[[Layer], None]) -> None:
    try:
        solve(layer)
    except SingularHessianError as error:
        raise SingularHessianError(
            f"{error} ({layer.num_tokens} calibration tokens were used)"
        ) from error
