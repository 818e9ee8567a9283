"""A block's forward that stops before its layers, so that each sees what pruned layers make.

Layers of a block are solved one after another: a layer's input is measured when the layers before
it are pruned already. A forward that is held at a layer goes on from there once the layer is
solved, so that the calibration rows pass the block once. Where there is no room to hold the
forwards of all rows, each is begun anew and ends at the next layer: the same numbers for more
time. The dense model's forward beside it, in which nothing changes, stands nowhere: it passes the
stages and shows what it had there. Shape suffixes: B rows, T tokens of a row, I input features, D
hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.errors import InputError
from sparsify.models.calls import BlockInputs, StopForward, run_block
from sparsify.models.structure import linears_of, writers_of
from sparsify.models.watch import ResidualAdds, watch_linears, watch_outputs

BLOCK_INPUT = -1


@dataclass(frozen=True)
class Stages:
    """The layers of a block in the order in which they can be solved."""

    groups: list[list[str]]
    """names relative to the block; those of one group share an input"""
    streams: dict[str, int]
    """layer that writes to the residual stream -> which tensor it is added to: the result of this
    add to the stream, counted from 0, or BLOCK_INPUT"""
    is_in_order: bool = True
    """every forward comes to the groups one after another, once each, so that it can stop there"""

    def streams_at(self, stage: int, call: BlockInputs, adds: ResidualAdds) -> dict[str, Tensor]:
        """What a forward's layers of a stage will be added to; see `Stop.streams`."""
        found = {}
        for name in self.groups[stage]:
            source = self.streams.get(name)
            if source == BLOCK_INPUT:
                found[name] = call.hidden_BTD
            elif source is not None and source < len(adds.sums):
                found[name] = adds.sums[source]
        return found


@dataclass
class Stop:
    """What a forward has when it stands before a group of layers, or has passed it."""

    inputs: Tensor
    """(..., I) of the group"""
    streams: dict[str, Tensor]
    """layer of the group -> the residual stream (B, T, D) that its output will be added to"""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """the same layers -> what they put out (..., D), if the forward has passed them"""


def stages_of(block: nn.Module, call: BlockInputs, groups: list[list[str]]) -> Stages:
    """Whether a block's layers can be solved one group after another, and its residual stream.

    They cannot in a block with a list of modules inside (a mixture of experts), whose layers are
    not called by every token, nor where the call comes to a layer not once.

    Args:
        block: a decoder block.
        call: one call of it.
        groups: from `shared_input_groups`.
    """
    linears = linears_of(block)
    lists = [name for name, module in block.named_modules() if isinstance(module, nn.ModuleList)]
    counts = {name: 0 for group in groups for name in group}
    has_list = any(name.startswith(f"{outer}.") for name in counts for outer in lists)

    def count(name: str, _: Tensor) -> None:
        counts[name] += 1

    watched = {name: linears[name] for group in groups for name in group}
    adds = ResidualAdds()
    adding = writers_of(watched, call.hidden_BTD.shape[-1])
    with watch_linears(watched, count), watch_outputs(adding, adds.saw), adds:
        run_block(block, call)
    streams = _streams(adds, call.hidden_BTD)
    return Stages(
        groups,
        {name: source for name, source in streams.items() if counts[name] == 1},
        is_in_order=not has_list and all(count == 1 for count in counts.values()),
    )


def _streams(adds: ResidualAdds, hidden_BTD: Tensor) -> dict[str, int]:
    """See `Stages.streams`; layers that are added to another tensor are left out."""
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
    """stage that is looked for; None: the end alone"""
    found: Stop | None = None
    output_BTD: Tensor | None = None
    held: _Held | None = None
    """None: not to be gone on with"""


class StoppingBlock:
    """Forwards of one block on many batches, each going from stage to stage.

    A context: leaving it ends all forwards and removes the hooks.

    Args:
        block: whose layers may change while forwards stand before them.
        stages: from `stages_of`, in order.
        hold: True holds every forward where it stands, in a thread of its own of which never more
            than one runs. False begins it anew for each stage.
    """

    def __init__(self, block: nn.Module, stages: Stages, *, hold: bool) -> None:
        self._block = block
        self._linears = linears_of(block)
        self._stages = stages
        self._hold = hold
        self._current: _Forward | None = None
        self._held: dict[int, _Held] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for stage, group in enumerate(self._stages.groups):
            self._handles.append(
                self._linears[group[0]].register_forward_pre_hook(
                    lambda _, args, stage=stage: self._reached(stage, args[0])
                )
            )
        for name in self._stages.streams:
            self._handles.append(
                self._linears[name].register_forward_hook(
                    lambda _, __, out, name=name: self._left(name, out)
                )
            )
        return self

    def __exit__(self, *error: Any) -> None:
        for batch in list(self._held):
            self._let_go(batch)
        for handle in self._handles:
            handle.remove()

    def stop_at(self, stage: int, batch: int, call: Callable[[], BlockInputs]) -> Stop:
        """What the forward of a batch has at a stage; stages come in order.

        Args:
            stage: index into `Stages.groups`.
            batch: its number.
            call: the block's call for the batch, asked for when a forward begins.

        Raises:
            InputError: the forward did not come to the stage.
        """
        forward = self._run(batch, call, stage)
        stop, forward.found = forward.found, None
        if stop is None:
            raise _not_in_order(self._block, self._stages.groups[stage][0])
        return stop

    def end(self, batch: int, call: Callable[[], BlockInputs]) -> Tensor:
        """The block's output for a batch, (B, T, D), with the weights as they are now."""
        output_BTD = self._run(batch, call, None).output_BTD
        assert output_BTD is not None
        self._let_go(batch)
        return output_BTD

    def _let_go(self, batch: int) -> None:
        """End a forward. It and its thread refer to each other, and its tensors must not wait for
        the garbage collector."""
        held = self._held.pop(batch, None)
        if held is not None:
            held.abandon()
            held.forward.held = None

    def _run(self, batch: int, call: Callable[[], BlockInputs], wanted: int | None) -> _Forward:
        held = self._held.get(batch)
        forward = _Forward(call()) if held is None else held.forward
        if held is None and self._hold:
            held = self._held[batch] = forward.held = _Held(self._forward, forward)
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

    def _reached(self, stage: int, inputs: Tensor) -> None:
        forward = self._current
        if forward is None or stage != forward.wanted:
            return
        forward.found = Stop(inputs, self._stages.streams_at(stage, forward.call, forward.adds))
        if forward.held is None:
            raise StopForward
        forward.held.stand()

    def _left(self, name: str, output: Tensor) -> None:
        if self._current is not None:
            self._current.adds.saw(name, output)


def pass_stages(
    block: nn.Module, stages: Stages, call: BlockInputs, *, with_outputs: bool,
    last: int | None = None,
) -> tuple[list[Stop], Tensor | None]:  # fmt: skip
    """One forward that does not stand anywhere, and what it had at the stages on its way.

    Args:
        block: whose layers do not change meanwhile.
        stages: from `stages_of`, in order.
        call: of the block.
        with_outputs: stops have the outputs of layers that write to the residual stream, and of
            groups of such layers alone no inputs, but a tensor of their shape without values.
        last: the forward ends at this stage, or behind its outputs; None lets it run to its end.

    Returns:
        A stop for each stage passed; and what the block put out, (B, T, D), or None.

    Raises:
        InputError: the forward did not come to the stages in their order.
    """
    linears, writers = linears_of(block), stages.streams
    stops: list[Stop] = []
    adds = ResidualAdds()

    def enter(name: str, value: Tensor) -> None:
        stage = len(stops)
        if stage == len(stages.groups) or stages.groups[stage][0] != name:
            raise _not_in_order(block, name)
        group = stages.groups[stage]
        if with_outputs and all(member in writers for member in group):
            value = value.new_empty(()).expand(value.shape)
        stops.append(Stop(value, stages.streams_at(stage, call, adds)))
        finish(stage)

    def leave(name: str, output: Tensor) -> None:
        adds.saw(name, output)
        if not with_outputs:
            return
        stage = next(i for i, group in enumerate(stages.groups) if name in group)
        # A copy, for the block may add the residual stream to it in place.
        stops[stage].outputs[name] = output.clone()
        finish(stage)

    def finish(stage: int) -> None:
        wanted = [name for name in stages.groups[stage] if name in writers and with_outputs]
        if stage == last and len(stops[stage].outputs) == len(wanted):
            raise StopForward

    firsts = {group[0]: linears[group[0]] for group in stages.groups}
    adding = {name: linears[name] for name in writers}
    output_BTD = None
    with watch_linears(firsts, enter), watch_outputs(adding, leave), adds:
        try:
            output_BTD = run_block(block, call)
        except StopForward:
            return stops, None
    if len(stops) < len(stages.groups):
        raise _not_in_order(block, stages.groups[len(stops)][0])
    return stops, output_BTD


def _not_in_order(block: nn.Module, name: str) -> InputError:
    return InputError(
        f"layer {name} of a {type(block).__name__} is not called in one order for every batch of "
        "calibration rows; use prune.order=block"
    )


class _Held:
    """A forward in a thread that runs only while `resume` waits for it."""

    def __init__(self, run: Callable[[_Forward], None], forward: _Forward) -> None:
        self.forward = forward
        self._run = run
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: BaseException | None = None
        self._is_abandoned = False
        self._device = forward.call.hidden_BTD.device
        self._thread = threading.Thread(target=self._work, name="held forward", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self._go.acquire()
        try:
            # What torch keeps for each thread has to be as it is in the caller's.
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            if not self._is_abandoned:
                with torch.no_grad():
                    self._run(self.forward)
        except StopForward:
            pass
        except BaseException as error:  # handed to the caller of `resume`
            self._failure = error
        finally:
            self._back.release()

    def resume(self) -> None:
        """Let the forward run until it stands, ends or fails; raises what it raised."""
        self._go.release()
        self._back.acquire()
        if self._failure is not None:
            raise self._failure

    def stand(self) -> None:
        """Called by the forward itself: wait for the next `resume`."""
        self._back.release()
        self._go.acquire()
        if self._is_abandoned:
            raise StopForward

    def abandon(self) -> None:
        """End the forward where it stands, if it has not ended by itself."""
        self._is_abandoned = True
        self._go.release()
        self._thread.join()
