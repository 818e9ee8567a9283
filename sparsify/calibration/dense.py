"""The dense model beside a block whose groups of layers are solved one after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import deepcopy

from torch import Tensor

from sparsify.calibration.batches import Batch
from sparsify.calibration.block import BlockReader, DensePass, LoadedBlock
from sparsify.calibration.groups import GroupInputs, run_groups


class DenseGroups:
    """What the dense model has at a block's groups, for one group after another.

    Batches that are held pass the block once, before any layer is solved, and what later groups
    ask for is kept. Each of the others passes a copy of the block for every group.

    Args:
        reader: of the block.
        loaded: with its dense weights; if the dense model has passed it ahead, all batches have.
        batches: of this process.
        held: numbers of those that are held.
        with_outputs: see `groups.run_groups`.
        put: takes (number of a batch, the block's output), once for every batch.
    """

    def __init__(
        self, reader: BlockReader, loaded: LoadedBlock, batches: Sequence[Batch],
        held: Collection[int], with_outputs: bool, put: Callable[[int, Tensor], None],
    ) -> None:  # fmt: skip
        assert loaded.groups is not None
        if loaded.dense is None:
            first = [batch for batch in batches if batch.number in held]
            loaded.dense = DensePass(
                inputs=reader.pass_dense(loaded, "dense", first, with_outputs, put)
            )
        self._reader = reader
        self._index, self._groups = loaded.index, loaded.groups
        self._kept = loaded.dense.inputs
        is_whole = all((0, batch.number) in self._kept for batch in batches)
        self._twin = None if is_whole else deepcopy(loaded.block)
        self._with_outputs = with_outputs
        self._put = put

    def inputs_of(self, group: int, batch: Batch) -> GroupInputs:
        """What the dense model has at a group for a batch; asked for once."""
        kept = self._kept.pop((group, batch.number), None)
        if kept is not None:
            return kept
        assert self._twin is not None
        is_last = group + 1 == len(self._groups.names)
        call = self._reader.call(self._index, "dense", batch)
        passed, output_BTD = run_groups(
            self._twin, self._groups, call, with_outputs=self._with_outputs,
            last=None if is_last else group,
        )  # fmt: skip
        if output_BTD is not None:
            self._put(batch.number, output_BTD)
        return passed[group]
