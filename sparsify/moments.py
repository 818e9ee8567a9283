"""The moments of all inputs of one block: collected in one pass, summed over processes, factored.

Shape suffixes: B rows of a batch, T tokens of a row, I input features, D hidden size.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.comm import Comm
from sparsify.errors import CalibrationError, NonFiniteError, SingularHessianError
from sparsify.hessian import HessianSum, InverseFactor
from sparsify.kernels.gram import add_cross_, sum_dtype
from sparsify.models.stops import Stop
from sparsify.models.structure import (
    BlockInputs,
    Enough,
    ResidualAdds,
    linears_of,
    run_block,
    watch_linears,
    watch_outputs,
    writers_of,
)
from sparsify.statistics import Statistics


@dataclass
class BlockStatistics:
    """What a block's layers are solved with; names are relative to the block."""

    statistics: dict[str, Statistics]
    """first layer of a group that shares an input -> its moments"""
    residuals: dict[str, Tensor]
    """layer that writes to the residual stream -> float32 (O, I) mean of (r_dense - r) x^T"""


class Moments:
    """Running sums over tokens of one block's inputs.

    Args:
        block: with its dense weights.
        groups: its layers by shared input (`models.structure.shared_input_groups`).
        with_teacher: also sums with the dense model's inputs and residual stream, by `add_pair`.
        is_in_order: every forward calls the groups once each, in their order, so that `add` can end
            it at the last one: nobody needs that layer's product, a fifth of a Llama's block.
    """

    def __init__(
        self, block: nn.Module, groups: list[list[str]], with_teacher: bool,
        is_in_order: bool = False,
    ) -> None:  # fmt: skip
        linears = linears_of(block)
        self._last = groups[-1][0] if is_in_order else None
        self._block = block
        self._members = {group[0]: group for group in groups}
        self._watched = {group[0]: linears[group[0]] for group in groups}
        self._adding = {name: linears[name] for group in groups for name in group}
        self._sums = {
            name: HessianSum(module.in_features, module.weight.device)
            for name, module in self._watched.items()
        }
        self._with_teacher = with_teacher
        self._crosses: dict[str, Tensor] = {}
        self._residuals: dict[str, Tensor] = {}
        self._unpaired: set[str] = set()

    def add(self, call: BlockInputs, weights_BT: Tensor | None) -> None:
        """Run the block on one batch and add what its layers received.

        Args:
            call: of the block.
            weights_BT: how much each token counts; None: all the same.
        """

        def note(name: str, value: Tensor) -> None:
            self._add_input(name, value, weights_BT)
            if name == self._last:
                raise Enough

        with watch_linears(self._watched, note), contextlib.suppress(Enough):
            run_block(self._block, call)

    def add_pair(
        self, call: BlockInputs, teacher: BlockInputs, weights_BT: Tensor | None
    ) -> Tensor:
        """`add`, beside the same block on the dense model's hidden states.

        Returns:
            The block's output there, (B, T, D): the dense model's hidden states after the block.
        """
        inputs: dict[str, list[Tensor]] = {}
        streams: dict[str, list[Tensor]] = {}
        output_BTD = self._trace(teacher, inputs, streams)
        mine: dict[str, list[Tensor]] = {}
        my_streams: dict[str, list[Tensor]] = {}
        self._trace(call, mine, my_streams)
        for name in self._watched:
            for value in mine.get(name, []):
                self._add_input(name, value, weights_BT)
            self._add_cross(name, mine.get(name, []), inputs.get(name, []), weights_BT)
            for member in self._members[name]:
                pairs = (streams.get(member, []), my_streams.get(member, []))
                self._add_residual(member, mine.get(name, []), *pairs, weights_BT)
        return output_BTD

    def _trace(
        self, call: BlockInputs, inputs: dict[str, list[Tensor]], streams: dict[str, list[Tensor]]
    ) -> Tensor:
        """Run the block, keeping its layers' inputs and the residual streams they add to."""
        adds = ResidualAdds()
        adding = writers_of(self._adding, call.hidden_BTD.shape[-1])

        def note(name: str, value: Tensor) -> None:
            inputs.setdefault(name, []).append(value)

        with watch_linears(self._watched, note), watch_outputs(adding, adds.saw), adds:
            output_BTD = run_block(self._block, call)
        for name, stream in adds.onto:
            streams.setdefault(name, []).append(stream)
        return output_BTD

    def add_stop(self, mine: Stop, teacher: Stop | None, weights_BT: Tensor | None) -> None:
        """Add what one group's layers receive, and beside it what they do in the dense model.

        Args:
            mine: a forward before the layers, of which there is one group.
            teacher: the dense model's forward there.
            weights_BT: how much each token counts; None: all the same.
        """
        (name,) = self._watched
        self._add_input(name, mine.inputs, weights_BT)
        if teacher is None:
            return
        self._add_cross(name, [mine.inputs], [teacher.inputs], weights_BT)
        for member in self._members[name]:
            if member in mine.streams and member in teacher.streams:
                pair = [teacher.streams[member]], [mine.streams[member]]
                self._add_residual(member, [mine.inputs], *pair, weights_BT)

    def _add_input(self, name: str, value: Tensor, weights_BT: Tensor | None) -> None:
        self._sums[name].add(value, _weights_for(name, value, weights_BT))

    def _add_cross(
        self, name: str, mine: list[Tensor], dense: list[Tensor], weights_BT: Tensor | None
    ) -> None:
        if [v.shape for v in mine] != [v.shape for v in dense]:
            # An expert was given other tokens than in the dense model: nothing to compare.
            self._unpaired.add(name)
            return
        for value, dense_value in zip(mine, dense, strict=True):
            weights_T = _weights_for(name, value, weights_BT)
            _add_product_(self._crosses, name, dense_value, value, weights_T)

    def _add_residual(
        self, name: str, inputs: list[Tensor], dense: list[Tensor], mine: list[Tensor],
        weights_BT: Tensor | None,
    ) -> None:  # fmt: skip
        """Only where the layer was called once and added once, in both models."""
        if not len(inputs) == len(dense) == len(mine) == 1:
            return
        # Rounded once to the type of the inputs, so that products run on tensor cores.
        difference = (dense[0].float() - mine[0].float()).to(inputs[0].dtype)
        weights_T = _weights_for(name, inputs[0], weights_BT)
        _add_product_(self._residuals, name, difference, inputs[0], weights_T)

    def is_finite(self) -> bool:
        """Whether every sum so far is a number."""
        return all(total.is_finite() for total in self._sums.values())

    def merge(self, other: Moments) -> None:
        """Add the sums of `other`, of the same block."""
        for name, total in self._sums.items():
            total.merge(other._sums[name])
        for sums, others in ((self._crosses, other._crosses), (self._residuals, other._residuals)):
            for name, value in others.items():
                sums[name] = sums[name].add_(value) if name in sums else value
        self._unpaired |= other._unpaired

    def reduce(self, comm: Comm) -> BlockStatistics:
        """The means over all processes' tokens, on all of them.

        Raises:
            NonFiniteError, CalibrationError: see `hessian.HessianSum.mean`; the message begins
                with the layer's name.
        """
        unpaired = set().union(*comm.share(self._unpaired))
        found = BlockStatistics({}, {})
        for name, total in self._sums.items():
            total.reduce(comm)
            try:
                hessian_II = total.mean()
            except (NonFiniteError, CalibrationError) as error:
                raise type(error)(f"{name}: {error}") from error
            cross_II = None
            if self._with_teacher and name not in unpaired:
                cross_II = self._mean_of(self._crosses, name, total.weight, comm)
                for member in self._members[name]:
                    if member in self._residuals:
                        found.residuals[member] = self._mean_of(
                            self._residuals, member, total.weight, comm
                        )
            found.statistics[name] = Statistics(hessian_II, total.num_tokens, cross_II)
        return found

    def _mean_of(self, sums: dict[str, Tensor], name: str, weight: float, comm: Comm) -> Tensor:
        value = sums.pop(name)
        comm.all_reduce_(value)
        return value.div_(weight).float()


def _weights_for(name: str, value: Tensor, weights_BT: Tensor | None) -> Tensor | None:
    if weights_BT is None:
        return None
    num_tokens = value.numel() // value.shape[-1]
    if weights_BT.numel() != num_tokens:
        raise CalibrationError(
            f"layer {name}: sees {num_tokens} of {weights_BT.numel()} tokens, so tokens cannot be "
            "weighted (a mixture of experts?); use prune.fisher=false"
        )
    return weights_BT.reshape(-1).to(value.device)


def _add_product_(
    sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor, weights_T: Tensor | None
) -> None:
    """Add left^T (weights) right, summed over tokens, to `sums[name]`."""
    left_TL, right_TI = (v.detach().flatten(0, -2) for v in (left, right))
    if weights_T is not None:
        left_TL = left_TL.float() * weights_T[:, None]
    if name not in sums:
        shape = left_TL.shape[1], right_TI.shape[1]
        device = right_TI.device
        sums[name] = torch.zeros(shape, dtype=sum_dtype(device), device=device)
    add_cross_(sums[name], left_TL, right_TI)


def share_factors(statistics: dict[str, Statistics], damping: float, comm: Comm) -> None:
    """Factor every Hessian once, on one of the processes, and hand the factors to all.

    The largest go first, each to the process with the least work so far.

    Args:
        statistics: layer name, for messages -> its moments; the same on all processes.
        damping: see `hessian.inverse_factor`.
        comm: the processes.

    Raises:
        NonFiniteError, SingularHessianError: on all processes alike.
    """
    work = [0.0] * comm.world_size
    owner: dict[str, int] = {}
    sizes = {name: len(stats.hessian_II) for name, stats in statistics.items()}
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        owner[name] = work.index(min(work))
        work[owner[name]] += float(sizes[name]) ** 3
    made: dict[str, InverseFactor] = {}
    failure: Exception | None = None
    for name, stats in statistics.items():
        if owner[name] == comm.rank and failure is None:
            try:
                made[name] = stats.factor(damping, name)
            except (NonFiniteError, SingularHessianError) as error:
                failure = error
    failures = [error for error in comm.share(failure) if error is not None]
    if failures:
        raise failures[0]
    facts = {name: (f.damping, f.num_attempts, f.condition) for name, f in made.items()}
    facts = {name: fact for part in comm.share(facts) for name, fact in part.items()}
    for name, stats in statistics.items():
        # One layout on all processes, whether the factor was computed here or received.
        upper_II = (
            made[name].upper_II.contiguous() if name in made else torch.empty_like(stats.hessian_II)
        )
        comm.broadcast_(upper_II, owner[name])
        used, num_attempts, condition = facts[name]
        dead_I = stats.hessian_II.diagonal() == 0
        stats.put_factor(damping, InverseFactor(upper_II, used, num_attempts, dead_I, condition))
