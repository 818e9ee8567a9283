"""Opening a block: reading it, seeing its layers, and having the dense model pass it.

Nothing of this waits for a layer to be solved, so all of it can be done for the next block while
the layers of this one are. Shape suffixes: B rows of a batch, T tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from sparsify.calibration.accumulate import MomentSums
from sparsify.calibration.batches import Batch
from sparsify.calibration.groups import Stages, Stop, pass_stages, stages_of
from sparsify.calibration.hidden_states import HiddenStateStore
from sparsify.calibration.timing import PhaseTimer
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.models.blocks import Blocks
from sparsify.models.calls import BlockCalls, BlockInputs, run_block
from sparsify.models.isolation import require_isolation
from sparsify.models.structure import linears_of
from sparsify.models.watch import shared_input_groups


@dataclass
class LoadedBlock:
    """A block with its weights, and what the solver's walk has to know of it."""

    index: int
    block: nn.Module
    layers: dict[str, nn.Linear]
    """those to be pruned, by their names relative to the block"""
    stages: Stages | None
    """of the layers to be pruned; None: there are none"""
    dense: DensePass | None = None
    """None: the dense model has not passed it yet"""

    def tensors(self) -> Iterator[Tensor]:
        """All that are held here."""
        yield from self.block.parameters()
        yield from self.block.buffers()
        if self.dense is not None:
            yield from self.dense.tensors()


@dataclass
class DensePass:
    """What all batches have of a block in the dense model."""

    outputs: dict[int, Tensor] = field(default_factory=dict)
    """number of the batch -> hidden states behind the block, (B, T, D); none behind the last"""
    stops: dict[tuple[int, int], Stop] = field(default_factory=dict)
    """(stage, number of the batch) -> what a teacher has there"""
    moments: MomentSums | None = None
    """of all inputs, where they are measured in the dense model"""

    def tensors(self) -> Iterator[Tensor]:
        """All that are held here."""
        yield from self.outputs.values()
        for stop in self.stops.values():
            yield from (stop.inputs, *stop.streams.values(), *stop.outputs.values())
        if self.moments is not None:
            yield from self.moments.tensors()


class BlockReader:
    """Opens blocks one after another.

    Args:
        source: the model's blocks.
        linears: (block index, full name, module) of the layers to be pruned.
        rows: calibration rows of all processes.
        batches: those of this one.
        store: the hidden states before a block.
    """

    def __init__(
        self, source: Blocks, linears: list[tuple[int, str, nn.Linear]], rows: TokenRows,
        batches: list[Batch], store: HiddenStateStore,
    ) -> None:  # fmt: skip
        self.calls = BlockCalls(source.model, source.blocks)
        self._source = source
        self._linears = linears
        self._rows = rows
        self._batches = batches
        self._store = store
        self._is_known = False

    def call(self, index: int, stream: str, batch: Batch) -> BlockInputs:
        """The call of block `index` for a batch, whose stream stands before it."""
        hidden_BTD = self._store.get(stream, batch.number)
        return self.calls.call(index, batch.rows, hidden_BTD)

    def open(self, index: int, stream: str, phases: PhaseTimer) -> LoadedBlock:
        """A block with its weights, and its layers in stages.

        Args:
            index: of the block; that before it has been opened, or is the walk's first.
            stream: one that stands before the block.
            phases: collects the time of reading and of looking.

        Raises:
            InputError: see `models.blocks`, `models.structure` and `models.packed`.
        """
        with phases.measure("load"):
            block = self._source.open(index)
        if not self._is_known:
            self._learn(block)
        prefix = f"{self._source.list_name}.{index}."
        layers = {
            name.removeprefix(prefix): module for at, name, module in self._linears if at == index
        }
        opened = LoadedBlock(index, block, layers, None)
        if layers:
            with phases.measure("statistics"):
                opened.stages = self.stages(opened, stream)
        return opened

    def stages(self, opened: LoadedBlock, stream: str) -> Stages:
        """The layers to be pruned in stages, as the first batch of a stream calls them."""
        index, block = opened.index, opened.block
        left_out = [name for name in linears_of(block) if name not in opened.layers]
        call = self.call(index, stream, self._batches[0])
        row, hidden_BTD = self._batches[0].rows[:1], call.hidden_BTD[:1]
        one = self.calls.call(index, row, hidden_BTD)
        try:  # one row shows what calls what, unless there are experts that it does not call
            groups = shared_input_groups(block, one, left_out)
        except InputError:
            groups = shared_input_groups(block, call, left_out)
        return stages_of(block, one, groups)

    def _learn(self, block: nn.Module) -> None:
        """See how blocks are called, and that they keep documents apart."""
        self.calls.learn(block, self._rows[:1])
        self._is_known = True
        if self._rows.is_packed:
            model = self._source.model
            require_isolation(
                lambda rows: run_block(block, self.calls.first(rows)),
                model.get_input_embeddings().num_embeddings,  # type: ignore[operator]
                type(model).__name__,
            )

    def pass_dense(self, opened: LoadedBlock, stream: str, with_outputs: bool) -> DensePass | None:
        """Have the dense model's batches pass a block whose layers are to be solved in stages.

        Args:
            opened: with its dense weights.
            stream: the dense model's.
            with_outputs: see `models.stops.pass_stages`.

        Returns:
            Stops and outputs; or None where the stages are not in order.
        """
        if opened.stages is not None and not opened.stages.is_in_order:
            return None
        found = DensePass()
        for batch in self._batches:
            call = self.call(opened.index, stream, batch)
            if opened.stages is None:
                output_BTD: Tensor | None = run_block(opened.block, call)
            else:
                stops, output_BTD = pass_stages(
                    opened.block, opened.stages, call, with_outputs=with_outputs
                )
                found.stops |= {(at, batch.number): stop for at, stop in enumerate(stops)}
            if output_BTD is not None and opened.index + 1 < len(self._source.blocks):
                found.outputs[batch.number] = output_BTD
        return found
