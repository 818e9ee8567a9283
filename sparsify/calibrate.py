"""The walk over a model's decoder blocks: statistics of each linear's input, then a solver.

Blocks are visited in order, and only one is needed at a time. In the order of layers, the rows
stop before each of a block's linears until it is solved, so that one pass gives the statistics of
all of them, each behind the ones pruned before it, and what the next block will receive. In the
order of blocks, as SparseGPT's authors do it, a first pass gives the statistics of all linears of
the block as if it were dense, and a second one hands on what the solved block makes. A method with
a teacher also follows the dense model, in one pass beside the first. Processes share the rows.
Shape suffixes: N rows, T tokens of a row, D hidden size, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from sparsify.batches import Batch, share_of
from sparsify.comm import Comm, sum_lanes
from sparsify.errors import CalibrationError, InputError, NonFiniteError, SingularHessianError
from sparsify.models.blocks import Blocks
from sparsify.models.packed import require_isolation
from sparsify.models.stops import Stages, Stop, StoppingBlock, pass_stages, stages_of
from sparsify.models.structure import (
    BlockCalls,
    BlockInputs,
    find_blocks,
    linears_of,
    run_block,
    shared_input_groups,
)
from sparsify.moments import Moments, TargetShares, share_factors
from sparsify.phases import Phases
from sparsify.statistics import Statistics
from sparsify.streams import StreamStore
from sparsify.text import TokenRows

Order = Literal["layer", "block", "dense"]


@dataclass
class Layer:
    """One linear layer, as handed to the solver."""

    name: str
    """full dotted name, without ".weight\""""
    module: nn.Linear
    block: int
    """index of the decoder block"""
    statistics: Statistics
    """moments of its input; layers that share an input share them"""
    wanted_OI: Tensor | None = None
    """float32 mean of (a W y + b (r_dense - r)) x^T for a layer that adds to a residual stream r: W
    is its dense weight, y its input in the dense model, x its own, a and b are the shares asked
    for; None if they were not, if the layer adds to none, or where `cross_II` has no pairs"""


@dataclass(frozen=True)
class Wants:
    """What a solver needs of the walk."""

    teacher: bool = False
    """follow the dense model too, for `cross_II`"""
    target_shares: TargetShares | None = None
    """with a teacher: `wanted_OI` of layers that write to the residual stream, with these shares.
    Their statistics have no `cross_II` then, unless another kind of layer shares them"""
    factor_damping: float | None = None
    """compute the factors with this damping, each on one process, before handing out the layers"""
    order: Order = "block"
    """layer: measure a layer's input when the layers before it are solved; block: when the blocks
    before it are; dense: as it is in the dense model, without a teacher. Where layer is asked for,
    blocks that are not `models.stops.Stages.is_in_order` are measured in the order block"""


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


@torch.no_grad()
def walk_blocks(
    source: Blocks,
    rows: TokenRows,
    solve: Callable[[Layer], None],
    *,
    comm: Comm,
    batch_size: int,
    wants: Wants,
    skip: Sequence[str] = (),
    store: StreamStore | None = None,
    first_block: int = 0,
    on_block: Callable[[int, nn.Module], None] | None = None,
    phases: Phases | None = None,
    token_weights: Tensor | None = None,
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Hand every linear layer of every decoder block to `solve`, with its statistics.

    Args:
        source: the model's blocks; their weights change as `solve` changes them.
        rows: calibration rows, the same on all processes; each process takes its lanes of them.
        solve: called once per layer, in the same order on all processes; sets
            `layer.module.weight.data` in place, to the same values on all processes, at the latest
            in the next `settle`.
        comm: the processes that take part, and whether they add up in a fixed order.
        batch_size: rows per forward of a block.
        wants: what `solve` needs.
        skip: see `prunable_linears`.
        store: keeps the hidden states between blocks; None keeps them beside the weights. If it
            keeps them on the device, forwards too are held there while layers are solved; else
            each is begun anew for every group of layers.
        first_block: go on here; `store` then holds the streams before it, and earlier blocks are
            not looked at.
        on_block: called as on_block(index, block) after a block's layers are solved and the
            streams stand before the next block; the block's weights are still there.
        phases: collects the time of each kind of work.
        token_weights: float32 (blocks, N, T), how much each token counts; None: all the same.
        settle: called before the weights of solved layers are used.

    Raises:
        InputError: see `models.structure`.
        CalibrationError: rows of the wrong shape, or fewer rows than lanes.
        NonFiniteError: activations hold NaN or infinity; names the layer and the rows.
        SingularHessianError: as raised by `solve`, with the number of tokens added.

    Cost: order "block": two forwards of every block over the rows (three with a teacher), without
    one the first only up to the last layer; hidden states of this process's rows and the moments of
    one block in memory. Order "dense": one forward, and the same memory. Order "layer": one forward
    (two with a teacher) where forwards are held, for which a Llama keeps its widest activation of
    these rows, and with a teacher three times the hidden states; about two (four) and a second copy
    of the block where they are not. The moments of one input at a time.
    """
    linears = prunable_linears(source.model, skip)
    walk = _Walk(
        source, rows, comm, batch_size, wants, store, phases or Phases(), token_weights, settle
    )
    was_training = source.model.training
    source.model.eval()
    try:
        walk.enter(first_block)
        for index in range(first_block, len(source.blocks)):
            with walk.phases.measure("load"):
                block = source.open(index)
            names = {name: module for at, name, module in linears if at == index}
            walk.visit(index, block, names, lambda layer: _solve_layer(layer, solve))
            if on_block is not None:
                on_block(index, block)
            source.close(index)
    finally:
        source.model.train(was_training)


def _solve_layer(layer: Layer, solve: Callable[[Layer], None]) -> None:
    try:
        solve(layer)
    except SingularHessianError as error:
        tokens = layer.statistics.num_tokens
        raise SingularHessianError(f"{error} ({tokens} calibration tokens were used)") from error


_Found = Iterator[tuple[str, Statistics, Tensor | None]]
"""(name relative to the block, moments of its input, `Layer.wanted_OI`) of one layer after another,
each of which has to be solved before the next is asked for"""
_Note = Callable[[Moments, Batch, Tensor | None], None]
"""adds a batch with its token weights to the moments"""


class _Walk:
    """The streams before the current block, and what one block does with them."""

    def __init__(
        self, source: Blocks, rows: TokenRows, comm: Comm, batch_size: int, wants: Wants,
        store: StreamStore | None, phases: Phases, token_weights: Tensor | None,
        settle: Callable[[], None],
    ) -> None:  # fmt: skip
        self.phases = phases
        self._settle = settle
        self._source = source
        self._rows = rows
        self._comm = comm
        self._wants = wants
        self._lanes = share_of(rows, comm, batch_size)
        self._batches = [batch for lane in self._lanes for batch in lane]
        self._store = store or StreamStore("device", _device_of(source.model), None)
        self._calls = BlockCalls(source.model, source.blocks)
        self._streams = ("pruned", "dense") if wants.teacher else ("pruned",)
        self._token_weights = token_weights
        self._is_known = False

    def enter(self, first_block: int) -> None:
        """Bring the streams before the first block to be visited."""
        with self.phases.measure("load"):
            if first_block > 0:
                numbers = [batch.number for batch in self._batches]
                self._store.restore(first_block, self._streams, numbers)
                return
            for batch in self._batches:
                hidden_BTD = self._calls.first(batch.rows).hidden_BTD
                for stream in self._streams:
                    self._store.put(stream, batch.number, hidden_BTD, 0)

    def visit(
        self, index: int, block: nn.Module, names: dict[str, nn.Linear],
        solve: Callable[[Layer], None],
    ) -> None:  # fmt: skip
        """Have the block's layers solved, and bring the streams to stand before the next block."""
        if not self._is_known:
            self._learn(block)
        if not names:
            if self._wants.teacher:
                self._follow(index, block, "dense")
            self._follow(index, block, "pruned")
            return
        prefix = f"{self._source.list_name}.{index}."
        with self.phases.measure("statistics"):
            left_out = [name for name in linears_of(block) if prefix + name not in names]
            call = self._call(index, "pruned", self._batches[0])
            row, hidden_BTD = self._batches[0].rows[:1], call.hidden_BTD[:1]
            one = self._calls.call(index, row, hidden_BTD)
            try:  # one row shows what calls what, unless there are experts that it does not call
                groups = shared_input_groups(block, one, left_out)
            except InputError:
                groups = shared_input_groups(block, call, left_out)
            stages = stages_of(block, one, groups)
        layers = (
            self._layers_by_stage(index, block, stages)
            if stages.is_in_order and self._wants.order == "layer"
            else self._layers_at_once(index, block, stages)
        )
        for relative, statistics, wanted_OI in layers:
            name = prefix + relative
            solve(Layer(name, names[name], index, statistics, wanted_OI))

    def _learn(self, block: nn.Module) -> None:
        """See how blocks are called, and that they keep documents apart."""
        self._calls.learn(block, self._rows[:1])
        self._is_known = True
        if self._rows.is_packed:
            require_isolation(
                lambda rows: run_block(block, self._calls.first(rows)),
                self._source.model.get_input_embeddings().num_embeddings,  # type: ignore[operator]
                type(self._source.model).__name__,
            )

    def _layers_at_once(self, index: int, block: nn.Module, stages: Stages) -> _Found:
        """The layers, all measured in the dense block; then the pruned stream follows.

        In the order dense it is the dense block's output that flows on, from the same forward.
        """
        is_dense = self._wants.order == "dense"
        to_end = is_dense and index + 1 < len(self._source.blocks)

        def note(moments: Moments, batch: Batch, weights_BT: Tensor | None) -> None:
            call = self._call(index, "pruned", batch)
            if self._wants.teacher:
                hidden_BTD = self._store.get("dense", batch.number)
                teacher = BlockInputs(hidden_BTD, call.args, call.kwargs)
                self._put("dense", batch, moments.add_pair(call, teacher, weights_BT), index + 1)
                return
            output_BTD = moments.add(call, weights_BT, to_end=to_end)
            if output_BTD is not None:
                self._put("pruned", batch, output_BTD, index + 1)

        yield from self._measured(index, block, stages, stages.groups, note)
        if not is_dense:
            self._follow(index, block, "pruned")

    def _layers_by_stage(self, index: int, block: nn.Module, stages: Stages) -> _Found:
        """The layers, each measured behind the solved ones; the streams follow as they go."""
        hold = self._store.is_on_device
        dense = self._dense_stops(index, block, stages) if self._wants.teacher else None
        with StoppingBlock(block, stages, hold=hold) as pruned:
            for stage, group in enumerate(stages.groups):

                def note(
                    moments: Moments, batch: Batch, weights_BT: Tensor | None, stage: int = stage
                ) -> None:
                    call = partial(self._call, index, "pruned", batch)
                    # The dense model goes first: its layers are those of the block until one is
                    # solved.
                    teacher = None if dense is None else dense(stage, batch)
                    moments.add_stop(pruned.stop_at(stage, batch.number, call), teacher, weights_BT)

                yield from self._measured(index, block, stages, [group], note)
            if index + 1 < len(self._source.blocks):
                with self.phases.measure("forward"):
                    for batch in self._batches:
                        call = partial(self._call, index, "pruned", batch)
                        self._put("pruned", batch, pruned.end(batch.number, call), index + 1)

    def _dense_stops(
        self, index: int, block: nn.Module, stages: Stages
    ) -> Callable[[int, Batch], Stop]:
        """What the dense model has at a stage, for one stage after another.

        Where there is room, each batch passes the block once, before any layer is solved, and what
        later stages ask for is kept. Elsewhere it passes a copy of the block for every stage.
        """
        shares = self._wants.target_shares
        with_outputs = shares is not None and shares.teacher > 0
        hold = self._store.is_on_device
        twin = block if hold else deepcopy(block)
        kept: dict[tuple[int, int], Stop] = {}
        final = len(stages.groups) - 1

        def at(stage: int, batch: Batch) -> Stop:
            if stage == 0 or not hold:
                call = self._call(index, "dense", batch)
                last = None if hold or stage == final else stage
                stops, output_BTD = pass_stages(
                    twin, stages, call, with_outputs=with_outputs, last=last
                )
                if output_BTD is not None:
                    self._put("dense", batch, output_BTD, index + 1)
                if not hold:
                    return stops[stage]
                kept.update({(number, batch.number): stop for number, stop in enumerate(stops)})
            return kept.pop((stage, batch.number))

        return at

    def _measured(
        self, index: int, block: nn.Module, stages: Stages, groups: list[list[str]], note: _Note
    ) -> _Found:
        """The layers of some groups with the statistics of their inputs, over all rows."""
        prefix = f"{self._source.list_name}.{index}."
        with self.phases.measure("statistics"):
            new = partial(
                Moments, block, groups, self._wants.teacher, self._wants.target_shares,
                stages.streams, stages.is_in_order,
            )  # fmt: skip
            total = self._moments(index, new, note)
        with self.phases.measure("reduce"):
            try:
                found = total.reduce(self._comm)
            except (NonFiniteError, CalibrationError) as error:
                where = self._where_not_finite(index, block, groups)
                raise type(error)(f"block {index}, layer {prefix}{error}{where}") from error
        if self._wants.factor_damping is not None:
            with self.phases.measure("factor"):
                named = {f"{prefix}{group}": stats for group, stats in found.statistics.items()}
                share_factors(named, self._wants.factor_damping, self._comm)
        for group in groups:
            for name in group:
                yield name, found.statistics[group[0]], found.wanted.get(name)
        self._settle()

    def _moments(self, index: int, new: Callable[[], Moments], note: _Note) -> Moments:
        """The moments of this process's rows; lanes are added up as the leaves of a binary tree."""

        def of(lane: list[Batch]) -> Moments:
            moments = new()
            for batch in lane:
                weights_BT = None
                if self._token_weights is not None:
                    weights_BT = self._token_weights[index, batch.where]
                note(moments, batch, weights_BT)
            return moments

        return sum_lanes(map(of, self._lanes), Moments.merge)

    def _call(self, index: int, stream: str, batch: Batch) -> BlockInputs:
        hidden_BTD = self._store.get(stream, batch.number)
        return self._calls.call(index, batch.rows, hidden_BTD)

    def _put(self, stream: str, batch: Batch, hidden_BTD: Tensor, block: int) -> None:
        if block < len(self._source.blocks):  # nobody reads what the last block puts out
            self._store.put(stream, batch.number, hidden_BTD, block)

    def _follow(self, index: int, block: nn.Module, stream: str) -> None:
        """Run the block as it is, so that the stream stands before the next one."""
        if index + 1 == len(self._source.blocks):
            return
        with self.phases.measure("forward"):
            for batch in self._batches:
                output_BTD = run_block(block, self._call(index, stream, batch))
                self._put(stream, batch, output_BTD, index + 1)

    def _where_not_finite(self, index: int, block: nn.Module, groups: list[list[str]]) -> str:
        """The first rows that make a layer's input NaN or infinite, for the message."""
        mine = None
        for batch in self._batches:
            moments = Moments(block, groups, with_teacher=False)
            moments.add(self._call(index, "pruned", batch), None)
            if not moments.is_finite():
                mine = batch.where.start, batch.where.stop - 1
                break
        found = [where for where in self._comm.share(mine) if where is not None]
        return "; first in calibration rows {} to {}".format(*min(found)) if found else ""


def _device_of(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters() if p.device.type != "meta")
