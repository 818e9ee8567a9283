"""The moments of all inputs of one block: collected in one pass, summed over processes, factored.

Shape suffixes: B rows of a batch, T tokens of a row, or all tokens of a call, I input features,
O output features, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsify.calibration.groups import GroupInputs
from sparsify.calibration.hessian import HessianSum
from sparsify.calibration.moments import InputMoments
from sparsify.calibration.routed import Lenders, blend, dense_inputs_of
from sparsify.comm import Comm
from sparsify.errors import CalibrationError, NonFiniteError
from sparsify.kernels.gram import add_cross_, sum_dtype
from sparsify.models.calls import BlockInputs, StopForward, run_block
from sparsify.models.experts import expert_layers
from sparsify.models.structure import linears_of, writers_of
from sparsify.models.watch import ResidualAdds, watch_inputs, watch_outputs


@dataclass(frozen=True)
class TargetShares:
    """How far a layer that writes to the residual stream aims at the dense model's output."""

    teacher: float
    """a of `_target.teacher_target`: for the error of the layer's input; 0 to 1"""
    residual: float
    """b there: for the error of the residual stream that it adds to; 0 to 1"""


@dataclass
class BlockMoments:
    """What a block's layers are solved with; names are relative to the block."""

    moments: dict[str, InputMoments]
    """first layer of a group that shares an input -> its moments"""
    wanted: dict[str, Tensor]
    """layer that writes to the residual stream -> float32 (O, I), see `layers.Layer.wanted_OI`
    """


@dataclass
class _Seen:
    """What one forward showed of the layers, one tensor for every call."""

    inputs: dict[str, list[Tensor]]
    """first layer of a group -> (..., I) of the group"""
    outputs: dict[str, list[Tensor]]
    """layer that writes to the residual stream -> what it put out, (..., D)"""
    residuals: dict[str, list[Tensor]]
    """the same layer -> the residual stream that this was added to, (..., D)"""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """first layer of a group in an expert -> ids of the tokens that were sent there, (T,)"""


class MomentSums:
    """Running sums over tokens of one block's inputs.

    With a teacher, a layer that writes to the residual stream has one product measured for its
    target, O x I, where the groups' inputs in both models would take I x I. The latter are measured
    for groups with any other layer.

    Args:
        block: with its dense weights.
        groups: its layers by shared input (`models.watch.shared_input_groups`).
        with_teacher: also sums with what the dense model has, by `add_pair` or `add_group`.
        shares: of the product for layers that write; None: no such product, and the inputs in both
            models for all groups.
        writers: layers of the block that write to the residual stream (`groups.find_groups`).
        is_in_order: every forward calls the groups once each, in their order, so that `add` can end
            it at the last one: nobody needs that layer's product, a fifth of a Llama's block.
    """

    def __init__(
        self, block: nn.Module, groups: list[list[str]], with_teacher: bool,
        shares: TargetShares | None = None, writers: Collection[str] = (),
        is_in_order: bool = False,
    ) -> None:  # fmt: skip
        linears = linears_of(block)
        self._last = groups[-1][0] if is_in_order else None
        self._block = block
        self._shares = shares
        self._members = {group[0]: group for group in groups}
        self._watched = {group[0]: linears[group[0]] for group in groups}
        self._layers = {name: linears[name] for group in groups for name in group}
        self._sums = {
            name: HessianSum(module.in_features, module.weight.device)
            for name, module in self._watched.items()
        }
        self._wanted = {
            name: _zeros(layer.out_features, layer)
            for name, layer in self._layers.items()
            if with_teacher and shares is not None and name in writers
        }
        self._crosses = {
            group[0]: _zeros(linears[group[0]].in_features, linears[group[0]])
            for group in groups
            if with_teacher and any(name not in self._wanted for name in group)
        }
        self._unpaired: set[str] = set()
        known = expert_layers(block)
        self._experts = {name: known[name] for name in self._watched if name in known}

    def add(
        self, call: BlockInputs, weights_BT: Tensor | None, to_end: bool = False
    ) -> Tensor | None:
        """Run the block on one batch and add what its layers received.

        Args:
            call: of the block.
            weights_BT: how much each token counts; None: all the same.
            to_end: run on after the last layer, and return the block's output (B, T, D).
        """

        def note(name: str, value: Tensor) -> None:
            self._add_input(name, value, weights_BT, self._tokens_of(name))
            if name == self._last and not to_end:
                raise StopForward

        with watch_inputs(self._watched, note), contextlib.suppress(StopForward):
            output_BTD = run_block(self._block, call)
            return output_BTD if to_end else None
        return None

    def add_pair(
        self, call: BlockInputs, teacher: BlockInputs, weights_BT: Tensor | None
    ) -> Tensor:
        """`add`, beside the same block on the dense model's hidden states.

        Returns:
            The block's output there, (B, T, D): the dense model's hidden states after the block.
        """
        dense, output_BTD = self._trace(teacher)
        mine, _ = self._trace(call)
        for name in self._watched:
            for value in mine.inputs.get(name, []):
                self._add_input(name, value, weights_BT, mine.tokens.get(name))
            self._add_products(name, mine, dense, weights_BT)
        return output_BTD

    def _trace(self, call: BlockInputs) -> tuple[_Seen, Tensor]:
        """Run the block and see its layers, and what it puts out."""
        adds, seen = ResidualAdds(), _Seen({}, {}, {})
        adding = writers_of(self._layers, call.hidden_BTD.shape[-1]) if self._wanted else {}

        def enter(name: str, value: Tensor) -> None:
            seen.inputs.setdefault(name, []).append(value)
            if (tokens_T := self._tokens_of(name)) is not None:
                seen.tokens[name] = tokens_T

        def leave(name: str, output: Tensor) -> None:
            adds.saw(name, output)
            if name in self._wanted:
                # A copy, for the block may add the residual stream to it in place.
                seen.outputs.setdefault(name, []).append(output.clone())

        with watch_inputs(self._watched, enter), watch_outputs(adding, leave), adds:
            output_BTD = run_block(self._block, call)
        for name, residual in adds.onto:
            seen.residuals.setdefault(name, []).append(residual)
        return seen, output_BTD

    def add_group(
        self, mine: GroupInputs, teacher: GroupInputs | None, weights_BT: Tensor | None
    ) -> None:
        """Add what one group's layers receive, and beside it what they do in the dense model.

        Args:
            mine: a forward before the layers, of which there is one group.
            teacher: the dense model's forward there, with outputs if the shares need them.
            weights_BT: how much each token counts; None: all the same.
        """
        (name,) = self._watched
        self._add_input(name, mine.inputs, weights_BT, None)
        if teacher is not None:
            self._add_products(name, _seen_at(name, mine), _seen_at(name, teacher), weights_BT)

    def _tokens_of(self, name: str) -> Tensor | None:
        """Of the forward that is at a group: the tokens that an expert was sent, None elsewhere."""
        return self._experts[name].expert.tokens_T if name in self._experts else None

    def _add_input(
        self, name: str, value: Tensor, weights_BT: Tensor | None, tokens_T: Tensor | None
    ) -> None:
        self._sums[name].add(value, _weights_for(name, value, weights_BT, tokens_T))

    def _add_products(
        self, name: str, mine: _Seen, dense: _Seen, weights_BT: Tensor | None
    ) -> None:
        """Add the products of what the dense model has and a group's inputs."""
        inputs, dense_inputs = mine.inputs.get(name, []), dense.inputs.get(name, [])
        if name in self._experts:
            tokens = mine.tokens[name], dense.tokens[name]
            dense_inputs = [dense_inputs_of(inputs[0], tokens[0], dense_inputs[0], tokens[1])]
        if [v.shape for v in inputs] != [v.shape for v in dense_inputs]:
            # An expert was given other tokens than in the dense model: nothing to compare.
            self._unpaired.add(name)
            return
        members = [member for member in self._members[name] if member in self._wanted]
        for call, value in enumerate(inputs):
            weights_T = _weights_for(name, value, weights_BT, mine.tokens.get(name))
            if name in self._crosses:
                _add_product_(self._crosses[name], dense_inputs[call], value, weights_T)
            for member in members:
                wanted_TO = value.new_zeros(
                    value.flatten(0, -2).shape[0], len(self._wanted[member]), dtype=torch.float32
                )
                self._add_output_(wanted_TO, member, call, dense)
                if len(inputs) == 1:
                    self._add_residual_(wanted_TO, member, mine, dense)
                # Rounded once to the type of the inputs, so that products run on tensor cores.
                left_TO = wanted_TO.to(value.dtype)
                _add_product_(self._wanted[member], left_TO, value, weights_T)

    def _add_output_(self, wanted_TO: Tensor, name: str, call: int, dense: _Seen) -> None:
        """Add a W y, which is a layer's output in the dense model without the bias."""
        assert self._shares is not None
        if self._shares.teacher == 0:
            return
        bias_O = self._layers[name].bias
        output_TO = dense.outputs[name][call].flatten(0, -2).float()
        if bias_O is not None:
            output_TO = output_TO - bias_O.float()
        wanted_TO.add_(output_TO, alpha=self._shares.teacher)

    def _add_residual_(self, wanted_TO: Tensor, name: str, mine: _Seen, dense: _Seen) -> None:
        """Add b (r_dense - r), where the layer was added once in both models."""
        assert self._shares is not None
        ours, theirs = mine.residuals.get(name, []), dense.residuals.get(name, [])
        if self._shares.residual > 0 and len(ours) == len(theirs) == 1:
            gap_TO = (theirs[0].float() - ours[0].float()).flatten(0, -2)
            wanted_TO.add_(gap_TO, alpha=self._shares.residual)

    def is_finite(self) -> bool:
        """Whether every sum so far is a number."""
        return all(total.is_finite() for total in self._sums.values())

    def tensors(self) -> Iterator[Tensor]:
        """All sums."""
        for total in self._sums.values():
            yield from total.tensors()
        yield from self._crosses.values()
        yield from self._wanted.values()

    def merge(self, other: MomentSums) -> None:
        """Add the sums of `other`, of the same block."""
        for name, total in self._sums.items():
            total.merge(other._sums[name])
        for sums, others in ((self._crosses, other._crosses), (self._wanted, other._wanted)):
            for name, value in others.items():
                sums[name] += value
        self._unpaired |= other._unpaired

    def reduce(self, comm: Comm) -> BlockMoments:
        """The means over all processes' tokens, on all of them.

        Raises:
            NonFiniteError, CalibrationError: see `hessian.HessianSum.mean`; the message starts
                with the layer's name.
        """
        unpaired = set().union(*comm.gather_objects(self._unpaired))
        found = BlockMoments({}, {})
        for total in self._sums.values():
            total.reduce(comm)
        lenders = Lenders(self._experts, self._sums)
        for name, total in self._sums.items():
            num_lent = lenders.num_lent(name)
            try:
                own_II = None if num_lent == total.num_columns else total.mean()
                lent_II = lenders.mean(name, own_II) if num_lent else None
            except (NonFiniteError, CalibrationError) as error:
                raise type(error)(f"{name}: {error}") from error
            cross_II = None
            if name not in unpaired:
                for member in self._members[name]:
                    if member in self._wanted:
                        sum_OI = self._wanted.pop(member)
                        found.wanted[member] = _mean(sum_OI, total.weight, comm)
                if name in self._crosses:
                    cross_II = _mean(self._crosses.pop(name), total.weight, comm)
            hessian_II = own_II
            if lent_II is not None:
                hessian_II = blend(own_II, lent_II, num_lent)
                if cross_II is not None:
                    cross_II = blend(None if own_II is None else cross_II, lent_II, num_lent)
            assert hessian_II is not None
            found.moments[name] = InputMoments(hessian_II, total.num_tokens, cross_II, num_lent)
        return found


def _zeros(num_rows: int, layer: nn.Linear) -> Tensor:
    """A sum of `num_rows` rows over a layer's inputs."""
    device = layer.weight.device
    return torch.zeros(num_rows, layer.in_features, dtype=sum_dtype(device), device=device)


def _mean(sums: Tensor, weight: float, comm: Comm) -> Tensor:
    """The sum over all processes divided by the weight of their tokens, float32."""
    comm.all_reduce_(sums)
    return sums.div_(weight).float()


def _seen_at(name: str, found: GroupInputs) -> _Seen:
    """What a forward shows at a group whose first layer is `name`."""
    outputs, residuals = (
        {member: [value] for member, value in values.items()}
        for values in (found.outputs, found.residuals)
    )
    return _Seen({name: [found.inputs]}, outputs, residuals)


def _weights_for(
    name: str, value: Tensor, weights_BT: Tensor | None, tokens_T: Tensor | None
) -> Tensor | None:
    if weights_BT is None:
        return None
    if tokens_T is not None:
        weights_BT = weights_BT.flatten().to(tokens_T.device)[tokens_T]
    num_tokens = value.numel() // value.shape[-1]
    if weights_BT.numel() != num_tokens:
        raise CalibrationError(
            f"layer {name}: sees {num_tokens} of {weights_BT.numel()} tokens, so tokens cannot be "
            "weighted (a mixture of experts?); use prune.fisher=false"
        )
    return weights_BT.reshape(-1).to(value.device)


def _add_product_(sum_LI: Tensor, left: Tensor, right: Tensor, weights_T: Tensor | None) -> None:
    """Add left^T (weights) right, summed over tokens."""
    left_TL, right_TI = (v.detach().flatten(0, -2) for v in (left, right))
    if weights_T is not None:
        left_TL = left_TL.float() * weights_T[:, None]
    add_cross_(sum_LI, left_TL, right_TI)
