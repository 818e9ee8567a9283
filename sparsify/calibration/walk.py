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
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.calibration.accumulate import MomentSums
from sparsify.calibration.batches import Batch, lanes_of
from sparsify.calibration.block import BlockReader, DensePass, LoadedBlock
from sparsify.calibration.factors import assign_factors
from sparsify.calibration.groups import Stages, Stop, StoppingBlock, pass_stages
from sparsify.calibration.hidden_states import HiddenStateStore
from sparsify.calibration.layers import Layer, SolverNeeds, passes_ahead, prunable_linears
from sparsify.calibration.lookahead import Lookahead
from sparsify.calibration.moments import InputMoments
from sparsify.calibration.timing import PhaseTimer
from sparsify.comm import Comm, sum_lanes
from sparsify.data.rows import TokenRows
from sparsify.errors import CalibrationError, InputError, NonFiniteError, SingularHessianError
from sparsify.kernels.precision import float32_products
from sparsify.models.blocks import Blocks
from sparsify.models.calls import BlockInputs, run_block


@torch.no_grad()
def walk_blocks(
    source: Blocks,
    rows: TokenRows,
    solve: Callable[[Layer], None],
    *,
    comm: Comm,
    batch_size: int,
    needs: SolverNeeds,
    skip: Sequence[str] = (),
    store: HiddenStateStore | None = None,
    first_block: int = 0,
    on_block: Callable[[int, nn.Module], None] | None = None,
    phases: PhaseTimer | None = None,
    token_weights: Tensor | None = None,
    wait_for_pending: Callable[[], None] = lambda: None,
    overlap: bool = False,
) -> None:
    """Hand every linear layer of every decoder block to `solve`, with its statistics.

    Args:
        source: the model's blocks; their weights change as `solve` changes them.
        rows: calibration rows, the same on all processes; each process takes its lanes of them.
        solve: called once per layer, in the same order on all processes; sets
            `layer.module.weight.data` in place, to the same values on all processes, at the latest
            in the next `wait_for_pending`.
        comm: the processes that take part, and whether they add up in a fixed order.
        batch_size: rows per forward of a block.
        needs: what `solve` needs.
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
        wait_for_pending: called before the weights of solved layers are used.
        overlap: while layers are solved, factor the Hessians of the next ones (orders block and
            dense), and have the dense model pass the next block where it is followed (order layer
            with a teacher, order dense); `store` keeps the hidden states on the device then. The
            results are the same to the bit.

    Raises:
        InputError: see `models.structure`; or the dense model is to pass blocks ahead, and `store`
            keeps its hidden states elsewhere than on the device.
        CalibrationError: rows of the wrong shape, or fewer rows than lanes.
        NonFiniteError: activations hold NaN or infinity; names the layer and the rows.
        SingularHessianError: as raised by `solve`, with the number of tokens added.

    Cost: order "block": two forwards of every block over the rows (three with a teacher), without
    one the first only up to the last layer; hidden states of this process's rows and the moments of
    one block in memory. Order "dense": one forward, and the same memory. Order "layer": one
    forward (two with a teacher) where forwards are held, for which a Llama keeps its widest activation of
    these rows, and with a teacher three times the hidden states; about two (four) and a second copy
    of the block where they are not. The moments of one input at a time. What the dense model does
    ahead takes one block more, and with a teacher six times the hidden states, in the order dense
    once and the moments of a second block. Float32 is multiplied in full precision on a GPU.
    """
    linears = prunable_linears(source.model, skip)
    walk = _Walk(
        source, linears, rows, comm, batch_size, needs, store, phases or PhaseTimer(),
        token_weights, wait_for_pending, overlap,
    )  # fmt: skip
    was_training = source.model.training
    source.model.eval()
    try:
        with walk, float32_products():
            walk.enter(first_block)
            for index in range(first_block, len(source.blocks)):
                block = walk.visit(index, lambda layer: _solve_layer(layer, solve))
                if on_block is not None:
                    on_block(index, block)
                source.close(index)
    finally:
        source.model.train(was_training)


def _solve_layer(layer: Layer, solve: Callable[[Layer], None]) -> None:
    try:
        solve(layer)
    except SingularHessianError as error:
        tokens = layer.moments.num_tokens
        raise SingularHessianError(f"{error} ({tokens} calibration tokens were used)") from error


_Found = Iterator[tuple[str, InputMoments, Tensor | None]]
"""(name relative to the block, moments of its input, `Layer.wanted_OI`) of one layer after another,
each of which has to be solved before the next is asked for"""

_Note = Callable[[MomentSums, Batch, Tensor | None], None]
"""adds a batch with its token weights to the moments"""


class _Walk:
    """The streams before the current block, and what one block does with them.

    A context: leaving it waits for what was begun ahead.
    """

    def __init__(
        self, source: Blocks, linears: list[tuple[int, str, nn.Linear]], rows: TokenRows,
        comm: Comm, batch_size: int, needs: SolverNeeds, store: HiddenStateStore | None,
        phases: PhaseTimer, token_weights: Tensor | None, wait_for_pending: Callable[[], None],
        overlap: bool,
    ) -> None:  # fmt: skip
        self.phases = phases
        self._wait_for_pending = wait_for_pending
        self._source = source
        self._comm = comm
        self._needs = needs
        self._lanes = lanes_of(rows, comm, batch_size)
        self._batches = [batch for lane in self._lanes for batch in lane]
        device = _device_of(source.model)
        self._store = store or HiddenStateStore("device", device, None)
        self._opener = BlockReader(source, linears, rows, self._batches, self._store)
        self._streams = ("pruned", "dense") if needs.teacher else ("pruned",)
        self._token_weights = token_weights
        self._next: Callable[[], LoadedBlock] | None = None
        has_dense_pass = overlap and passes_ahead(needs.order, needs.teacher)
        if has_dense_pass and not self._store.is_on_device:
            raise InputError(
                "prune.overlap=true: what the dense model does ahead is kept on the device, which "
                "has no room for it; use prune.overlap=false, fewer calibration rows or more "
                "workers"
            )
        self._running = ExitStack()
        begin = self._running.enter_context
        self._ahead = begin(Lookahead(device, "dense pass")) if has_dense_pass else None
        self._factors = begin(Lookahead(device, "factors")) if overlap else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._running.close()

    def enter(self, first_block: int) -> None:
        """Bring the streams before the first block to be visited."""
        with self.phases.measure("load"):
            if first_block > 0:
                numbers = [batch.number for batch in self._batches]
                self._store.restore(first_block, self._streams, numbers)
                return
            for batch in self._batches:
                hidden_BTD = self._opener.calls.first(batch.rows).hidden_BTD
                for stream in self._streams:
                    self._store.put(stream, batch.number, hidden_BTD, 0)

    def visit(self, index: int, solve: Callable[[Layer], None]) -> nn.Module:
        """Have a block's layers solved, and bring the streams to stand before the next block.

        Returns:
            The block.
        """
        opened = self._open(index)
        if opened.stages is None:
            is_dense_behind = opened.dense is not None
            for stream in self._streams[:-1] if is_dense_behind else self._streams:
                self._follow(opened, stream)
            return opened.block
        layers = (
            self._layers_by_stage(opened, opened.stages)
            if opened.stages.is_in_order and self._needs.order == "layer"
            else self._layers_at_once(opened, opened.stages)
        )
        for relative, moments, wanted_OI in layers:
            name = f"{self._source.list_name}.{index}.{relative}"
            solve(Layer(name, opened.layers[relative], index, moments, wanted_OI))
        return opened.block

    def _open(self, index: int) -> LoadedBlock:
        """The block; if the dense model has passed it, its stream stands behind it already."""
        if self._ahead is None:
            return self._opener.open(index, "pruned", self.phases)
        with self.phases.measure("statistics"):
            opened = (self._next or self._begin(self._ahead, index))()
            if opened.dense is None:  # experts may be called otherwise than in the dense model
                opened.stages = self._opener.stages(opened, "pruned")
        self._next = None
        if opened.dense is not None and index + 1 < len(self._source.blocks):
            for number, output_BTD in opened.dense.outputs.items():
                self._put(self._streams[-1], number, output_BTD, index + 1)
            opened.dense.outputs.clear()
            self._next = self._begin(self._ahead, index + 1)
        return opened

    def _begin(self, ahead: Lookahead, index: int) -> Callable[[], LoadedBlock]:
        """Begin to open a block and to have the dense model, which stands before it, pass it."""

        def work() -> LoadedBlock:
            stream = self._streams[-1]
            opened = self._opener.open(index, stream, PhaseTimer())
            if self._needs.teacher or opened.stages is None:
                opened.dense = self._opener.pass_dense(opened, stream, self._with_outputs)
            else:
                opened.dense = dense = DensePass()
                dense.moments = self._dense_moments(
                    opened, opened.stages, dense.outputs.__setitem__
                )
            return opened

        return ahead.start(work, LoadedBlock.tensors)

    def _layers_at_once(self, opened: LoadedBlock, stages: Stages) -> _Found:
        """The layers, all measured in the dense block; then the pruned stream follows.

        In the order dense it is the dense block's output that flows on, from the same forward.
        """
        index = opened.index
        if self._needs.order == "dense":

            def put(number: int, output_BTD: Tensor) -> None:
                self._put("pruned", number, output_BTD, index + 1)

            passed = None if opened.dense is None else opened.dense.moments
            in_dense_model = partial(self._dense_moments, opened, stages, put)
            yield from self._measured(opened, stages.groups, lambda: passed or in_dense_model())
            return

        def note(moments: MomentSums, batch: Batch, weights_BT: Tensor | None) -> None:
            call = self._opener.call(index, "pruned", batch)
            if not self._needs.teacher:
                moments.add(call, weights_BT)
                return
            hidden_BTD = self._store.get("dense", batch.number)
            teacher = BlockInputs(hidden_BTD, call.args, call.kwargs)
            output_BTD = moments.add_pair(call, teacher, weights_BT)
            self._put("dense", batch.number, output_BTD, index + 1)

        moments = partial(self._moments, opened, stages, stages.groups, note)
        yield from self._measured(opened, stages.groups, moments)
        self._follow(opened, "pruned")

    def _dense_moments(
        self, opened: LoadedBlock, stages: Stages, put: Callable[[int, Tensor], None]
    ) -> MomentSums:
        """The moments of all inputs; `put(number of the batch, output)` takes what comes out."""
        to_end = opened.index + 1 < len(self._source.blocks)

        def note(moments: MomentSums, batch: Batch, weights_BT: Tensor | None) -> None:
            call = self._opener.call(opened.index, "pruned", batch)
            output_BTD = moments.add(call, weights_BT, to_end=to_end)
            if output_BTD is not None:
                put(batch.number, output_BTD)

        return self._moments(opened, stages, stages.groups, note)

    def _layers_by_stage(self, opened: LoadedBlock, stages: Stages) -> _Found:
        """The layers, each measured behind the solved ones; the streams follow as they go."""
        index, block, hold = opened.index, opened.block, self._store.is_on_device
        dense = self._dense_stops(opened, stages) if self._needs.teacher else None
        with StoppingBlock(block, stages, hold=hold) as pruned:
            for stage, group in enumerate(stages.groups):

                def note(
                    moments: MomentSums, batch: Batch, weights_BT: Tensor | None, stage: int = stage
                ) -> None:
                    call = partial(self._opener.call, index, "pruned", batch)
                    # The dense model goes first: its layers are those of the block until one is
                    # solved.
                    teacher = None if dense is None else dense(stage, batch)
                    moments.add_stop(pruned.stop_at(stage, batch.number, call), teacher, weights_BT)

                moments = partial(self._moments, opened, stages, [group], note)
                yield from self._measured(opened, [group], moments)
            if index + 1 < len(self._source.blocks):
                with self.phases.measure("forward"):
                    for batch in self._batches:
                        call = partial(self._opener.call, index, "pruned", batch)
                        output_BTD = pruned.end(batch.number, call)
                        self._put("pruned", batch.number, output_BTD, index + 1)

    def _dense_stops(self, opened: LoadedBlock, stages: Stages) -> Callable[[int, Batch], Stop]:
        """What the dense model has at a stage, for one stage after another.

        Where there is room, each batch passes the block once, before any layer is solved, and what
        later stages ask for is kept. Elsewhere it passes a copy of the block for every stage.
        """
        index, hold = opened.index, self._store.is_on_device
        if opened.dense is not None:
            passed = opened.dense.stops
            return lambda stage, batch: passed.pop((stage, batch.number))
        twin = opened.block if hold else deepcopy(opened.block)
        kept: dict[tuple[int, int], Stop] = {}
        final = len(stages.groups) - 1

        def at(stage: int, batch: Batch) -> Stop:
            if stage == 0 or not hold:
                call = self._opener.call(index, "dense", batch)
                last = None if hold or stage == final else stage
                stops, output_BTD = pass_stages(
                    twin, stages, call, with_outputs=self._with_outputs, last=last
                )
                if output_BTD is not None:
                    self._put("dense", batch.number, output_BTD, index + 1)
                if not hold:
                    return stops[stage]
                kept.update({(number, batch.number): stop for number, stop in enumerate(stops)})
            return kept.pop((stage, batch.number))

        return at

    @property
    def _with_outputs(self) -> bool:
        """Whether layers that write to the residual stream aim at the dense model's outputs."""
        shares = self._needs.target_shares
        return shares is not None and shares.teacher > 0

    def _measured(
        self, opened: LoadedBlock, groups: list[list[str]], moments: Callable[[], MomentSums]
    ) -> _Found:
        """The layers of some groups with the statistics of their inputs, over all rows."""
        prefix = f"{self._source.list_name}.{opened.index}."
        with self.phases.measure("statistics"):
            total = moments()
        with self.phases.measure("reduce"):
            try:
                found = total.reduce(self._comm)
            except (NonFiniteError, CalibrationError) as error:
                where = self._where_not_finite(opened, groups)
                raise type(error)(f"block {opened.index}, layer {prefix}{error}{where}") from error
        damping, assign = self._needs.factor_damping, None
        if damping is not None:
            with self.phases.measure("factor"):
                named = {f"{prefix}{group}": stats for group, stats in found.moments.items()}
                ahead = self._factors if len(groups) > 1 else None
                assign = assign_factors(named, damping, self._comm, ahead)
        for group in groups:
            if assign is not None:
                with self.phases.measure("factor"):
                    assign(f"{prefix}{group[0]}")
            for name in group:
                yield name, found.moments[group[0]], found.wanted.get(name)
        self._wait_for_pending()

    def _moments(
        self, opened: LoadedBlock, stages: Stages, groups: list[list[str]], note: _Note
    ) -> MomentSums:
        """The moments of this process's rows; lanes are added up as the leaves of a binary tree."""

        def of(lane: list[Batch]) -> MomentSums:
            moments = MomentSums(
                opened.block, groups, self._needs.teacher, self._needs.target_shares,
                stages.streams, stages.is_in_order,
            )  # fmt: skip
            for batch in lane:
                weights_BT = None
                if self._token_weights is not None:
                    weights_BT = self._token_weights[opened.index, batch.where]
                note(moments, batch, weights_BT)
            return moments

        return sum_lanes(map(of, self._lanes), MomentSums.merge)

    def _put(self, stream: str, batch: int, hidden_BTD: Tensor, block: int) -> None:
        if block < len(self._source.blocks):  # nobody reads what the last block puts out
            self._store.put(stream, batch, hidden_BTD, block)

    def _follow(self, opened: LoadedBlock, stream: str) -> None:
        """Run the block as it is, so that the stream stands before the next one."""
        if opened.index + 1 == len(self._source.blocks):
            return
        with self.phases.measure("forward"):
            for batch in self._batches:
                output_BTD = run_block(opened.block, self._opener.call(opened.index, stream, batch))
                self._put(stream, batch.number, output_BTD, opened.index + 1)

    def _where_not_finite(self, opened: LoadedBlock, groups: list[list[str]]) -> str:
        """The first rows that make a layer's input NaN or infinite, for the message."""
        mine = None
        for batch in self._batches:
            moments = MomentSums(opened.block, groups, with_teacher=False)
            moments.add(self._opener.call(opened.index, "pruned", batch), None)
            if not moments.is_finite():
                mine = batch.where.start, batch.where.stop - 1
                break
        found = [where for where in self._comm.gather_objects(mine) if where is not None]
        return "; first in calibration rows {} to {}".format(*min(found)) if found else ""


def _device_of(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters() if p.device.type != "meta")
