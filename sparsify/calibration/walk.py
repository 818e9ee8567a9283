"""The walk over a model's decoder blocks: moments of each linear's input, then a solver.

Blocks are visited in order, and only one is needed at a time. In the order of layers, the rows
pause before each group of a block's linears until it is solved, so that one pass gives the moments
of all of them, each after the ones pruned before it, and what the next block will receive. In the
order of blocks, as SparseGPT's authors do it, a first pass gives the moments of all linears of the
block as if it were dense, and a second one hands on what the solved block makes: one step with all
groups in place of one for each. A method with a teacher also follows the dense model, in one pass
beside the first. Processes share the rows. Hidden states are kept by the model that they are of:
"pruned" and, for a teacher, "dense".
Shape suffixes: N rows, T tokens of a row, D hidden size, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.calibration.accumulate import BlockMoments, MomentSums
from sparsify.calibration.batches import Batch, lanes_of
from sparsify.calibration.block import BlockReader, DensePass, LoadedBlock
from sparsify.calibration.dense import DenseGroups
from sparsify.calibration.factors import assign_factors
from sparsify.calibration.groups import LayerGroups, PausableBlock
from sparsify.calibration.hidden_states import HiddenStateStore, Memory
from sparsify.calibration.layers import Layer, SolverNeeds, passes_ahead, prunable_linears
from sparsify.calibration.lookahead import Lookahead
from sparsify.calibration.room import Room, forward_bytes
from sparsify.calibration.stacks import layers_of, stacks_of
from sparsify.calibration.timing import PhaseTimer, Progress
from sparsify.comm import Comm, sum_lanes
from sparsify.data.rows import TokenRows
from sparsify.errors import CalibrationError, InputError, NonFiniteError, SingularHessianError
from sparsify.kernels.precision import float32_products
from sparsify.models.blocks import Blocks
from sparsify.models.calls import BlockInputs, evaluating, run_block


@torch.no_grad()
def walk_blocks(
    source: Blocks,
    rows: TokenRows,
    solve: Callable[[Layer], None],
    *,
    comm: Comm,
    memory: Memory,
    needs: SolverNeeds,
    skip: Sequence[str] = (),
    store: HiddenStateStore | None = None,
    first_block: int = 0,
    progress: Progress | None = None,
    solve_stack: Callable[[list[Layer]], None] | None = None,
) -> None:
    """Hand every linear layer of every decoder block to `solve`, with the moments of its input.

    Args:
        source: the model's blocks; their weights change as `solve` changes them.
        rows: calibration rows, the same on all processes; each process takes its lanes of them.
        solve: called once per layer, in the same order on all processes; sets
            `layer.module.weight.data` in place, to the same values on all processes, at the latest
            in the next `Progress.wait_for_pending`.
        comm: the processes that take part, and whether they add up in a fixed order.
        memory: rows at once, what may be kept to save work, and whether work may be done ahead;
            the rest is the source's and the store's.
        needs: what `solve` needs.
        skip: see `prunable_linears`.
        store: keeps the hidden states between blocks; None keeps them beside the weights.
        first_block: continue here; `store` then holds the hidden states before it, and earlier
            blocks are not looked at.
        progress: see there; None tells nobody.
        solve_stack: called in place of `solve` with layers of experts that can be solved together
            (`stacks.stacks_of`); None: `solve` is called with each.

    Raises:
        InputError: see `models.structure`; or the dense model is to pass blocks ahead, and `store`
            keeps its hidden states elsewhere than on the device.
        CalibrationError: rows of the wrong shape, or fewer rows than lanes.
        NonFiniteError: activations hold NaN or infinity; names the layer and the rows.
        SingularHessianError: as raised by `solve`, with the tokens of the layer that it names.

    Cost: order "block": two forwards of every block over the rows (three with a teacher), without
    one the first only up to the last layer; hidden states of this process's rows and the moments of
    one block in memory. Order "dense": one forward, and the same memory. Order "layer": one forward
    (two with a teacher) for batches whose forwards are held (`room.forward_bytes`); about two
    (four) and, with a teacher, a second copy of the block for the others. The moments of one input
    at a time. What comes before the blocks is computed once for a batch if what it makes is kept,
    else for every forward. What the dense model does ahead takes one block more, and with a teacher
    six times the hidden states, in the order dense once and the moments of a second block. Float32
    is multiplied in full precision on a GPU.
    """
    linears = prunable_linears(source.model, skip)
    progress = progress or Progress()
    walk = _Walk(source, linears, rows, comm, memory, needs, store, progress)
    with evaluating(source.model), walk, float32_products():
        walk.enter(first_block)
        for index in range(first_block, len(source.blocks)):
            block = walk.visit(index, _Solver(solve, solve_stack))
            progress.on_block(index, block)
            source.close(index)


@dataclass(frozen=True)
class _Solver:
    """What layers are handed to."""

    one: Callable[[Layer], None]
    several: Callable[[list[Layer]], None] | None
    """None: layers come one by one, those that share an input in a row"""

    def solve(
        self, stack: list[list[str]], loaded: LoadedBlock, found: BlockMoments, prefix: str
    ) -> None:
        """Have the layers of a stack solved."""
        parts = [[group] for group in stack] if self.several is None else [stack]
        together = (layers_of(part, loaded, found, prefix) for part in parts)
        for layers in chain.from_iterable(together):
            try:
                if len(layers) > 1 and self.several is not None:
                    self.several(layers)
                else:
                    self.one(layers[0])
            except SingularHessianError as error:
                for layer in layers:
                    if str(error).startswith(f"{layer.name}: "):
                        used = f"{layer.moments.num_tokens} calibration tokens were used"
                        raise SingularHessianError(f"{error} ({used})") from error
                raise


_Note = Callable[[MomentSums, Batch, Tensor | None], None]
"""adds a batch with its token weights to the sums"""

_Put = Callable[[int, Tensor], None]
"""takes (number of a batch, its hidden states after the block)"""


class _Walk:
    """The hidden states before the current block, and what one block does with them.

    A context: leaving it waits for what was started ahead.
    """

    def __init__(
        self, source: Blocks, linears: list[tuple[int, str, nn.Linear]], rows: TokenRows,
        comm: Comm, memory: Memory, needs: SolverNeeds, store: HiddenStateStore | None,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._progress = progress
        self._timer = progress.timer
        self._source = source
        self._comm = comm
        self._needs = needs
        device = _device_of(source.model)
        self._lanes = [
            [replace(batch, rows=batch.rows.to(device)) for batch in lane]
            for lane in lanes_of(rows, comm, memory.batch_size)
        ]
        self._batches = [batch for lane in self._lanes for batch in lane]
        self._store = store or HiddenStateStore("device", device, None)
        self._room = Room(memory, self._store)
        self._held: set[int] = set()
        """numbers of the batches whose forwards wait while layers are solved"""
        self._widest = max(max(layer.weight.shape) for _, _, layer in linears)
        self._reader = BlockReader(
            source, linears, rows, self._batches, self._store, memory.attention
        )
        self._models = ("pruned", "dense") if needs.teacher else ("pruned",)
        self._next: Callable[[], LoadedBlock] | None = None
        has_dense_pass = memory.overlap and passes_ahead(needs.order, needs.teacher)
        if has_dense_pass and not self._store.is_on_device:
            raise InputError(
                "prune.overlap=true: what the dense model does ahead is kept on the device, which "
                "has no room for it; use prune.overlap=false, fewer calibration rows or more "
                "workers"
            )
        self._running = ExitStack()
        start = self._running.enter_context
        self._ahead = start(Lookahead(device, "dense pass")) if has_dense_pass else None
        self._factors = start(Lookahead(device, "factors")) if memory.overlap else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._running.close()
        self._reader.close()

    def enter(self, first_block: int) -> None:
        """Bring the hidden states before the first block to be visited, and see what there is room
        for: first of all what blocks are given, which every forward asks for."""
        waiting: dict[int, int] = {}
        with self._timer.measure("load"):
            for batch, hidden_BTD, anew in self._reader.enter(first_block, self._room):
                # What the dense model does ahead is there already.
                num_models = 1 if self._ahead is not None else len(self._models)
                held = forward_bytes(hidden_BTD, self._widest, num_models, self._store)
                waiting[batch.number] = held + anew
                for model in self._models if first_block == 0 else ():
                    self._store.put(model, batch.number, hidden_BTD, 0)
            if first_block > 0:
                self._store.restore(first_block, self._models, list(waiting))
        if self._needs.order == "layer":
            self._held = {number for number, size in waiting.items() if self._room.take(size)}

    def visit(self, index: int, solver: _Solver) -> nn.Module:
        """Have a block's layers solved, and bring the hidden states before the next block.

        Returns:
            The block.
        """
        loaded = self._load(index)
        groups, order = loaded.groups, self._needs.order
        if groups is None:
            for model in self._models[:-1] if loaded.dense else self._models:
                self._advance(loaded, model)
        elif order == "layer" and groups.is_in_order:
            with PausableBlock(loaded.block, groups, hold=self._held) as pruned:
                dense = self._dense_groups(loaded) if self._needs.teacher else None
                for at, names in enumerate(groups.names):
                    note = partial(self._note_group, loaded, pruned, dense, at)
                    self._solve(loaded, [names], partial(self._sum, loaded, [names], note), solver)
                self._advance(loaded, "pruned", pruned.finish)
        else:
            put = partial(self._put, self._models[-1], index)
            self._solve(loaded, groups.names, partial(self._sum_all, loaded, groups, put), solver)
            if order != "dense":  # there, the dense block's output is what flows on
                self._advance(loaded, "pruned")
        return loaded.block

    def _solve(
        self, loaded: LoadedBlock, groups: list[list[str]], sums: Callable[[], MomentSums],
        solver: _Solver,
    ) -> None:  # fmt: skip
        """Measure the inputs of some groups over all rows, and have their layers solved."""
        prefix = f"{self._source.list_name}.{loaded.index}."
        with self._timer.measure("statistics"):
            total = sums()
        with self._timer.measure("reduce"):
            try:
                found = total.reduce(self._comm)
            except (NonFiniteError, CalibrationError) as error:
                where = self._where_not_finite(loaded, groups)
                raise type(error)(f"block {loaded.index}, layer {prefix}{error}{where}") from error
        stacks = stacks_of(groups, loaded)
        firsts = [[f"{prefix}{group[0]}" for group in stack] for stack in stacks]
        damping, assign = self._needs.factor_damping, None
        if damping is not None:
            with self._timer.measure("factor"):
                named = {f"{prefix}{first}": moments for first, moments in found.moments.items()}
                ahead = self._factors if len(stacks) > 1 else None
                assign = assign_factors(named, firsts, damping, self._comm, ahead)
        for stack, names in zip(stacks, firsts, strict=True):
            if assign is not None:
                with self._timer.measure("factor"):
                    assign(names)
            solver.solve(stack, loaded, found, prefix)
        self._progress.wait_for_pending()

    def _sum(self, loaded: LoadedBlock, groups: list[list[str]], note: _Note) -> MomentSums:
        """The sums of this process's rows; lanes are added up as the leaves of a binary tree."""
        assert loaded.groups is not None
        writers, is_in_order = loaded.groups.residuals, loaded.groups.is_in_order

        def of(lane: list[Batch]) -> MomentSums:
            sums = MomentSums(
                loaded.block, groups, self._needs.teacher, self._needs.target_shares, writers,
                is_in_order,
            )  # fmt: skip
            for batch in lane:
                weights_BT = None
                if self._needs.token_weights is not None:
                    weights_BT = self._needs.token_weights[loaded.index, batch.where]
                note(sums, batch, weights_BT)
            return sums

        return sum_lanes(map(of, self._lanes), MomentSums.merge)

    def _sum_all(self, loaded: LoadedBlock, groups: LayerGroups, put: _Put) -> MomentSums:
        """The sums of all inputs, as they are before any layer is solved.

        `put` takes the block's output for the last of `_models`: the dense model of a teacher, or
        the only one in the order dense; in the order block without a teacher there is none yet.
        """
        if loaded.dense is not None and loaded.dense.moments is not None:
            return loaded.dense.moments
        is_last = loaded.index + 1 == len(self._source.blocks)

        def note(sums: MomentSums, batch: Batch, weights_BT: Tensor | None) -> None:
            call = self._reader.call(loaded.index, "pruned", batch)
            if self._needs.teacher:
                teacher = replace(call, hidden_BTD=self._store.get("dense", batch.number))
                output_BTD: Tensor | None = sums.add_pair(call, teacher, weights_BT)
            else:
                to_end = self._needs.order == "dense" and not is_last
                output_BTD = sums.add(call, weights_BT, to_end=to_end)
            if output_BTD is not None:
                put(batch.number, output_BTD)

        return self._sum(loaded, groups.names, note)

    def _note_group(
        self, loaded: LoadedBlock, pruned: PausableBlock, dense: DenseGroups | None, at: int,
        sums: MomentSums, batch: Batch, weights_BT: Tensor | None,
    ) -> None:  # fmt: skip
        """Add what a group receives after the solved ones, and beside it what it does if dense."""
        teacher = None if dense is None else dense.inputs_of(at, batch)
        call = partial(self._reader.call, loaded.index, "pruned", batch)
        sums.add_group(pruned.inputs_of(at, batch.number, call), teacher, weights_BT)

    def _dense_groups(self, loaded: LoadedBlock) -> DenseGroups:
        """What the dense model has at the groups; made before any of their layers is solved."""
        put = partial(self._put, "dense", loaded.index)
        with self._timer.measure("statistics"):
            return DenseGroups(
                self._reader, loaded, self._batches, self._held, self._needs.has_dense_outputs, put
            )

    def _pass_dense(self, loaded: LoadedBlock, put: _Put) -> DensePass | None:
        """Have the dense model pass a block before any of its layers is solved.

        Returns:
            What was seen there; None where a teacher's groups are not in order, so that experts
            may be called otherwise than in the pruned model.
        """
        groups = loaded.groups
        if groups is not None and not self._needs.teacher:
            return DensePass(moments=self._sum_all(loaded, groups, put))
        if groups is not None and not groups.is_in_order:
            return None
        model, with_outputs = self._models[-1], self._needs.has_dense_outputs
        return DensePass(
            inputs=self._reader.pass_dense(loaded, model, self._batches, with_outputs, put)
        )

    def _load(self, index: int) -> LoadedBlock:
        """The block; if the dense model has passed it, its hidden states are after it already."""
        if self._ahead is None:
            return self._reader.load(index, "pruned", self._timer)
        with self._timer.measure("statistics"):
            loaded = (self._next or self._start(self._ahead, index))()
            if loaded.dense is None:  # experts may be called otherwise than in the dense model
                loaded.groups = self._reader.groups(loaded, "pruned")
        self._next = None
        if loaded.dense is not None and index + 1 < len(self._source.blocks):
            for number, output_BTD in loaded.dense.outputs.items():
                self._put(self._models[-1], index, number, output_BTD)
            loaded.dense.outputs.clear()
            self._next = self._start(self._ahead, index + 1)
        return loaded

    def _start(self, ahead: Lookahead, index: int) -> Callable[[], LoadedBlock]:
        """Start to load a block and to have the dense model, which is before it, pass it."""

        def work() -> LoadedBlock:
            outputs: dict[int, Tensor] = {}

            def keep(number: int, output_BTD: Tensor) -> None:
                if index + 1 < len(self._source.blocks):
                    outputs[number] = output_BTD

            loaded = self._reader.load(index, self._models[-1], PhaseTimer())
            loaded.dense = self._pass_dense(loaded, keep)
            if loaded.dense is not None:
                loaded.dense.outputs = outputs
            return loaded

        return ahead.start(work, LoadedBlock.tensors)

    def _put(self, model: str, index: int, batch: int, output_BTD: Tensor) -> None:
        """Keep what block `index` made of a batch; nobody reads what the last block puts out."""
        if index + 1 < len(self._source.blocks):
            self._store.put(model, batch, output_BTD, index + 1)

    def _advance(
        self, loaded: LoadedBlock, model: str,
        finish: Callable[[int, Callable[[], BlockInputs]], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Bring a model's hidden states after the block as it is now, by whole forwards or by
        finishing paused ones."""
        if loaded.index + 1 == len(self._source.blocks):
            return
        with self._timer.measure("forward"):
            for batch in self._batches:
                call = partial(self._reader.call, loaded.index, model, batch)
                output_BTD = (
                    run_block(loaded.block, call()) if finish is None
                    else finish(batch.number, call)
                )  # fmt: skip
                self._put(model, loaded.index, batch.number, output_BTD)

    def _where_not_finite(self, loaded: LoadedBlock, groups: list[list[str]]) -> str:
        """The first rows that make a layer's input NaN or infinite, for the message."""
        mine = None
        for batch in self._batches:
            sums = MomentSums(loaded.block, groups, with_teacher=False)
            sums.add(self._reader.call(loaded.index, "pruned", batch), None)
            if not sums.is_finite():
                mine = batch.where.start, batch.where.stop - 1
                break
        found = [where for where in self._comm.gather_objects(mine) if where is not None]
        return "; first in calibration rows {} to {}".format(*min(found)) if found else ""


def _device_of(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters() if p.device.type != "meta")
