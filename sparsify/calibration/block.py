"""Loading a block: its weights, its layers in groups, and the dense model's pass over it.

Nothing of this waits for a layer to be solved, so all of it can be done for the next block while
the layers of this one are. Shape suffixes: B rows of a batch, T tokens of a row, D hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from sparsify.calibration.accumulate import MomentSums
from sparsify.calibration.batches import Batch
from sparsify.calibration.groups import GroupInputs, LayerGroups, find_groups, run_groups
from sparsify.calibration.hidden_states import HiddenStateStore
from sparsify.calibration.room import Room
from sparsify.calibration.timing import PhaseTimer
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.models.blocks import Blocks
from sparsify.models.calls import BlockArguments, BlockCalls, BlockInputs, run_block
from sparsify.models.isolation import require_causal, require_isolation
from sparsify.models.structure import base_of, linears_of
from sparsify.models.varlen import HALF, documents_of, has_kernel
from sparsify.models.varlen_check import choose_attention
from sparsify.models.watch import shared_input_groups

_ONE_ROW = -1  # in place of a batch's number: the first row of the first batch


def _nothing() -> None:
    pass


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@dataclass
class LoadedBlock:
    """A block with its weights, and what the solver's walk has to know of it."""

    index: int
    block: nn.Module
    layers: dict[str, nn.Linear]
    """those to be pruned, by their names relative to the block"""
    groups: LayerGroups | None
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
    """number of the batch -> hidden states after the block, (B, T, D), until they are stored; none
    after the last"""
    inputs: dict[tuple[int, int], GroupInputs] = field(default_factory=dict)
    """(group, number of the batch) -> what a teacher has there"""
    moments: MomentSums | None = None
    """of all inputs, where they are measured in the dense model"""

    def tensors(self) -> Iterator[Tensor]:
        """All that are held here."""
        yield from self.outputs.values()
        for found in self.inputs.values():
            yield from (found.inputs, *found.residuals.values(), *found.outputs.values())
        if self.moments is not None:
            yield from self.moments.tensors()


class BlockReader:
    """Loads blocks one after another, and knows how they are called.

    Args:
        source: the model's blocks.
        linears: (block index, full name, module) of the layers to be pruned.
        rows: calibration rows of all processes.
        batches: those of this one, on the device.
        store: the hidden states before a block.
        attention: see `hidden_states.Memory`.
    """

    def __init__(
        self, source: Blocks, linears: list[tuple[int, str, nn.Linear]], rows: TokenRows,
        batches: list[Batch], store: HiddenStateStore, attention: str,
    ) -> None:  # fmt: skip
        base = base_of(source.model)
        self._calls = BlockCalls(source.model, source.blocks, partial(documents_of, base))
        self._attention = attention
        self._attend_as_before: Callable[[], None] = _nothing
        self._source = source
        self._linears = linears
        self._rows = rows
        self._batches = batches
        self._store = store
        self._opened: nn.Module | None = None
        """the walk's first block, until it is loaded"""
        self._arguments: dict[int, BlockArguments] = {}
        """number of a batch, or `_ONE_ROW` -> what the model gives its blocks, where it is kept"""

    def enter(self, index: int, room: Room) -> Iterator[tuple[Batch, Tensor, int]]:
        """See how blocks are called, and keep what they are given as far as there is room.

        What is kept is read by all threads and streams: it is made before the first of them starts.

        Args:
            index: of the walk's first block.
            room: for what is kept.

        Yields:
            One batch after another, its hidden states (B, T, D) before the model's first block, and
            the bytes of what every call has to be given anew.

        Raises:
            InputError: see `models.blocks`, `models.structure` and `models.isolation`.
        """
        self._opened = self._source.open(index)
        self._learn(self._opened)
        self._keep(_ONE_ROW, self._batches[0].rows[:1], room)
        for batch in self._batches:
            yield batch, *self._keep(batch.number, batch.rows, room)

    def _keep(self, number: int, rows: TokenRows, room: Room) -> tuple[Tensor, int]:
        hidden_BTD, arguments = self._calls.all(rows)
        if not arguments.is_constant or not room.take(arguments.num_bytes):
            return hidden_BTD, arguments.num_bytes
        self._arguments[number] = arguments
        return hidden_BTD, 0

    def call(self, index: int, model: str, batch: Batch) -> BlockInputs:
        """The call of block `index` for a batch, whose hidden states in `model` are before it."""
        hidden_BTD = self._store.get(model, batch.number)
        return self._call(index, batch.number, batch.rows, hidden_BTD)

    def _call(self, index: int, number: int, rows: TokenRows, hidden_BTD: Tensor) -> BlockInputs:
        kept = self._arguments.get(number)
        if kept is None:
            return self._calls.call(index, rows, hidden_BTD)
        return kept.call(index, hidden_BTD)

    def load(self, index: int, model: str, timer: PhaseTimer) -> LoadedBlock:
        """A block with its weights, and its layers in groups.

        Args:
            index: of the block; that before it has been loaded, or it is the walk's first.
            model: one whose hidden states are before the block, "pruned" or "dense".
            timer: of reading and of looking.

        Raises:
            InputError: see `models.blocks` and `models.structure`.
        """
        with timer.measure("load"):
            block = self._source.open(index) if self._opened is None else self._opened
            self._opened = None
        prefix = f"{self._source.list_name}.{index}."
        layers = {
            name.removeprefix(prefix): module for at, name, module in self._linears if at == index
        }
        loaded = LoadedBlock(index, block, layers, None)
        if layers:
            with timer.measure("statistics"):
                loaded.groups = self.groups(loaded, model)
        return loaded

    def close(self) -> None:
        """Leave the model as it was."""
        self._attend_as_before()
        self._attend_as_before = _nothing

    def groups(self, loaded: LoadedBlock, model: str) -> LayerGroups:
        """The layers to be pruned in groups, as the first batch in a model calls them."""
        index, block = loaded.index, loaded.block
        left_out = [name for name in linears_of(block) if name not in loaded.layers]
        call = self.call(index, model, self._batches[0])
        one = self._call(index, _ONE_ROW, self._batches[0].rows[:1], call.hidden_BTD[:1])
        try:  # one row shows what calls what, unless there are experts that it does not call
            names = shared_input_groups(block, one, left_out)
        except InputError:
            names = shared_input_groups(block, call, left_out)
        return find_groups(block, one, names)

    def _learn(self, block: nn.Module) -> None:
        """See that blocks look back alone, keep documents apart, and how they are called."""
        model = self._source.model
        name = type(model).__name__
        vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]

        def run(rows: TokenRows) -> Tensor:
            return run_block(block, self._calls.first(rows))

        require_causal(run, vocabulary, name)
        if self._rows.is_joined:
            require_isolation(run, vocabulary, name)
            weight = next(block.parameters())
            if self._attention != "auto" or has_kernel(weight.device, weight.dtype):
                self._attend_as_before = choose_attention(
                    model, self._attention, True, weight.dtype in HALF, _warn, run
                )
        self._calls.learn(block, self._rows[:1])

    def pass_dense(
        self, loaded: LoadedBlock, model: str, batches: Sequence[Batch], with_outputs: bool,
        put: Callable[[int, Tensor], None],
    ) -> dict[tuple[int, int], GroupInputs]:  # fmt: skip
        """Have batches of the dense model pass a block whose groups, if any, are in order.

        Args:
            loaded: with its dense weights.
            model: under which the store has the dense model's hidden states.
            batches: that pass.
            with_outputs: see `groups.run_groups`.
            put: takes (number of a batch, the block's output).

        Returns:
            See `DensePass.inputs`.
        """
        inputs: dict[tuple[int, int], GroupInputs] = {}
        for batch in batches:
            call = self.call(loaded.index, model, batch)
            if loaded.groups is None:
                output_BTD: Tensor | None = run_block(loaded.block, call)
            else:
                passed, output_BTD = run_groups(
                    loaded.block, loaded.groups, call, with_outputs=with_outputs
                )
                inputs |= {(at, batch.number): found for at, found in enumerate(passed)}
            assert output_BTD is not None
            put(batch.number, output_BTD)
        return inputs
