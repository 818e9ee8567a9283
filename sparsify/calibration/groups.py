"""A block's forward that pauses before its layers, so that each sees what pruned layers make.

Layers of a block are solved one group after another, and a group's input is measured when the
layers before it are pruned already. A forward that is paused at a group continues there once the
group is solved, so that the calibration rows pass the block once. Forwards that there is no room to
keep start again for every group and end there: the same numbers for more time. The dense model's
forward beside it, in which nothing changes, never pauses: it runs through the groups and records
what it has at each. Shape suffixes: B rows, T tokens of a row, I input features, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.errors import InputError
from sparsify.models.calls import BlockInputs, StopForward, run_block
from sparsify.models.experts import RoutedExperts
from sparsify.models.structure import linears_of, writers_of
from sparsify.models.watch import ResidualAdds, watch_inputs, watch_outputs

BLOCK_INPUT = -1


@dataclass(frozen=True)
class LayerGroups:
    """The layers of a block in the order in which they can be solved."""

    names: list[list[str]]
    """relative to the block; the layers of one group share an input"""
    residuals: dict[str, int]
    """layer that writes to the residual stream -> which tensor it is added to: the result of this
    add to the stream, counted from 0, or BLOCK_INPUT"""
    is_in_order: bool = True
    """every forward comes to the groups one after another, once each, so that it can pause there"""

    def residuals_at(self, group: int, call: BlockInputs, adds: ResidualAdds) -> dict[str, Tensor]:
        """What a forward's layers of a group will be added to; see `GroupInputs.residuals`."""
        found = {}
        for name in self.names[group]:
            source = self.residuals.get(name)
            if source == BLOCK_INPUT:
                found[name] = call.hidden_BTD
            elif source is not None and source < len(adds.sums):
                found[name] = adds.sums[source]
        return found


@dataclass
class GroupInputs:
    """What a forward has at a group of layers."""

    inputs: Tensor
    """(..., I) of the group"""
    residuals: dict[str, Tensor]
    """layer of the group -> the residual stream (B, T, D) that its output will be added to"""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """the same layers -> what they put out (..., D), if the forward has passed them"""


def find_groups(block: nn.Module, call: BlockInputs, names: list[list[str]]) -> LayerGroups:
    """Whether a block's layers can be solved one group after another, and what they are added to.

    They cannot in a block with a list of modules inside (a mixture of experts), whose layers are
    not called by every token: of each, all groups of the block are measured in one pass, where a
    pause before each would take hundreds. Nor can they where the call comes to a layer not once.

    Args:
        block: a decoder block.
        call: one call of it.
        names: from `shared_input_groups`.
    """
    linears = linears_of(block)
    kinds = (nn.ModuleList, RoutedExperts)
    lists = [name for name, module in block.named_modules() if isinstance(module, kinds)]
    counts = {name: 0 for group in names for name in group}
    has_list = any(name.startswith(f"{outer}.") for name in counts for outer in lists)

    def count(name: str, _: Tensor) -> None:
        counts[name] += 1

    watched = {name: linears[name] for group in names for name in group}
    adds = ResidualAdds()
    adding = writers_of(watched, call.hidden_BTD.shape[-1])
    with watch_inputs(watched, count), watch_outputs(adding, adds.saw), adds:
        run_block(block, call)
    residuals = _residuals(adds, call.hidden_BTD)
    return LayerGroups(
        names,
        {name: source for name, source in residuals.items() if counts[name] == 1},
        is_in_order=not has_list and all(count == 1 for count in counts.values()),
    )


def _residuals(adds: ResidualAdds, hidden_BTD: Tensor) -> dict[str, int]:
    """See `LayerGroups.residuals`; layers that are added to another tensor are left out."""
    found = {}
    for position, (name, other) in enumerate(adds.onto):
        before = [index for index in range(position) if _is_same(adds.sums[index], other)]
        if before:
            found[name] = before[-1]
        elif _is_same(hidden_BTD, other):
            found[name] = BLOCK_INPUT
    return found


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that are both alive are one, be it in another shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


@dataclass
class _Forward:
    """One forward of the block on one batch."""

    call: BlockInputs
    adds: ResidualAdds = field(default_factory=ResidualAdds)
    wanted: int | None = None
    """group that is looked for; None: the end alone"""
    found: GroupInputs | None = None
    output_BTD: Tensor | None = None
    held: _HeldForward | None = None
    """None: ends where it is stopped"""


class PausableBlock:
    """Forwards of one block on many batches, each going from group to group.

    A context: leaving it ends all forwards and removes the hooks.

    Args:
        block: whose layers may change while forwards are paused before them.
        groups: from `find_groups`, in order.
        hold: numbers of the batches whose forwards are kept where they are paused, each in a thread
            of its own of which never more than one runs. The others start again for each group.
    """

    def __init__(self, block: nn.Module, groups: LayerGroups, *, hold: Container[int]) -> None:
        self._block = block
        self._groups = groups
        self._hold = hold
        self._current: _Forward | None = None
        self._held: dict[int, _HeldForward] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        linears = linears_of(self._block)
        firsts = {names[0]: at for at, names in enumerate(self._groups.names)}
        self._hooks.enter_context(
            watch_inputs(
                {name: linears[name] for name in firsts},
                lambda name, inputs: self._reached(firsts[name], inputs),
            )
        )
        adding = {name: linears[name] for name in self._groups.residuals}
        self._hooks.enter_context(watch_outputs(adding, self._left))
        return self

    def __exit__(self, *error: Any) -> None:
        for batch in list(self._held):
            self._drop(batch)
        self._hooks.close()

    def inputs_of(self, group: int, batch: int, call: Callable[[], BlockInputs]) -> GroupInputs:
        """What the forward of a batch has at a group; groups come in order.

        Args:
            group: index into `LayerGroups.names`.
            batch: its number.
            call: the block's call for the batch, asked for when a forward starts.

        Raises:
            InputError: the forward did not come to the group.
        """
        forward = self._run(batch, call, group)
        found, forward.found = forward.found, None
        if found is None:
            raise _not_in_order(self._block, self._groups.names[group][0])
        return found

    def finish(self, batch: int, call: Callable[[], BlockInputs]) -> Tensor:
        """The block's output for a batch, (B, T, D), with the weights as they are now."""
        output_BTD = self._run(batch, call, None).output_BTD
        assert output_BTD is not None
        self._drop(batch)
        return output_BTD

    def _drop(self, batch: int) -> None:
        """End a forward. It and its thread refer to each other, and its tensors must not wait for
        the garbage collector."""
        held = self._held.pop(batch, None)
        if held is not None:
            held.cancel()
            held.forward.held = None

    def _run(self, batch: int, call: Callable[[], BlockInputs], wanted: int | None) -> _Forward:
        held = self._held.get(batch)
        forward = _Forward(call()) if held is None else held.forward
        if held is None and batch in self._hold:
            held = self._held[batch] = forward.held = _HeldForward(self._forward, forward)
        forward.wanted = wanted
        self._current = forward
        try:
            if held is None:
                self._forward(forward)
            else:
                held.resume()
        except StopForward:
            pass
        finally:
            self._current = None
        return forward

    def _forward(self, forward: _Forward) -> None:
        with forward.adds:
            forward.output_BTD = run_block(self._block, forward.call)

    def _reached(self, group: int, inputs: Tensor) -> None:
        forward = self._current
        if forward is None or group != forward.wanted:
            return
        residuals = self._groups.residuals_at(group, forward.call, forward.adds)
        forward.found = GroupInputs(inputs, residuals)
        if forward.held is None:
            raise StopForward
        forward.held.pause()

    def _left(self, name: str, output: Tensor) -> None:
        if self._current is not None:
            self._current.adds.saw(name, output)


def run_groups(
    block: nn.Module, groups: LayerGroups, call: BlockInputs, *, with_outputs: bool,
    last: int | None = None,
) -> tuple[list[GroupInputs], Tensor | None]:  # fmt: skip
    """One forward that never pauses, and what it had at the groups on its way.

    Args:
        block: whose layers do not change meanwhile.
        groups: from `find_groups`, in order.
        call: of the block.
        with_outputs: record the outputs of layers that write to the residual stream, and for
            groups of such layers alone no inputs, but a tensor of their shape without values.
        last: the forward ends at this group, or after its outputs; None lets it run to its end.

    Returns:
        What it had at each group that it reached; and the block's output, (B, T, D), or None.

    Raises:
        InputError: the forward did not come to the groups in their order.
    """
    linears, writers = linears_of(block), groups.residuals
    passed: list[GroupInputs] = []
    adds = ResidualAdds()

    def enter(name: str, value: Tensor) -> None:
        at = len(passed)
        if at == len(groups.names) or groups.names[at][0] != name:
            raise _not_in_order(block, name)
        if with_outputs and all(member in writers for member in groups.names[at]):
            value = value.new_empty(()).expand(value.shape)
        passed.append(GroupInputs(value, groups.residuals_at(at, call, adds)))
        stop_after(at)

    def leave(name: str, output: Tensor) -> None:
        adds.saw(name, output)
        if not with_outputs:
            return
        at = next(at for at, names in enumerate(groups.names) if name in names)
        # A copy, for the block may add the residual stream to it in place.
        passed[at].outputs[name] = output.clone()
        stop_after(at)

    def stop_after(at: int) -> None:
        wanted = [name for name in groups.names[at] if name in writers and with_outputs]
        if at == last and len(passed[at].outputs) == len(wanted):
            raise StopForward

    firsts = {names[0]: linears[names[0]] for names in groups.names}
    adding = {name: linears[name] for name in writers}
    with watch_inputs(firsts, enter), watch_outputs(adding, leave), adds:
        try:
            output_BTD = run_block(block, call)
        except StopForward:
            return passed, None
    if len(passed) < len(groups.names):
        raise _not_in_order(block, groups.names[len(passed)][0])
    return passed, output_BTD


def _not_in_order(block: nn.Module, name: str) -> InputError:
    return InputError(
        f"layer {name} of a {type(block).__name__} is not called in one order for every batch of "
        "calibration rows; use prune.order=block"
    )


class _HeldForward:
    """A forward in a thread that runs only while `resume` waits for it."""

    def __init__(self, run: Callable[[_Forward], None], forward: _Forward) -> None:
        self.forward = forward
        self._run = run
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: BaseException | None = None
        self._is_cancelled = False
        self._device = forward.call.hidden_BTD.device
        self._thread = threading.Thread(target=self._work, name="held forward", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self._go.acquire()
        try:
            # What torch keeps for each thread has to be as it is in the caller's.
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            if not self._is_cancelled:
                with torch.no_grad():
                    self._run(self.forward)
        except StopForward:
            pass
        except BaseException as error:  # handed to the caller of `resume`
            self._failure = error
        finally:
            self._back.release()

    def resume(self) -> None:
        """Let the forward run until it pauses, ends or fails; raises what it raised."""
        self._go.release()
        self._back.acquire()
        if self._failure is not None:
            raise self._failure

    def pause(self) -> None:
        """Called by the forward itself: wait for the next `resume`."""
        self._back.release()
        self._go.acquire()
        if self._is_cancelled:
            raise StopForward

    def cancel(self) -> None:
        """End the forward where it is paused, if it has not ended by itself."""
        self._is_cancelled = True
        self._go.release()
        self._thread.join()
