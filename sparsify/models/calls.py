"""What a decoder block is called with, and calling it again with the same arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.models.structure import find_blocks


@dataclass(frozen=True)
class BlockInputs:
    """One call of a decoder block: its hidden states and everything else it was given."""

    hidden_BTD: Tensor
    args: tuple[Any, ...]
    """positional arguments after the hidden states"""
    kwargs: dict[str, Any]


class BlockArguments:
    """What all blocks are given beside the hidden states for one batch, for any number of calls.

    A model gives blocks of one kind the same tensors (sliding and full attention, for example, a
    mask each), which are so held once, and known to be of one kind.

    Args:
        calls: of all blocks, in order.
        rows: of the batch, which are there anyway.
    """

    def __init__(self, calls: Sequence[BlockInputs], rows: TokenRows) -> None:
        self._each = [(call.args, call.kwargs) for call in calls]
        given = [value for args, kwargs in self._each for value in (*args, *kwargs.values())]
        leaves = list(_leaves(given))
        self.is_constant = all(isinstance(leaf, _CONSTANT) for leaf in leaves)
        """whether they serve any number of calls: a cache or a list may remember one"""
        storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
        sizes = {found.data_ptr(): found.nbytes() for found in storages}
        for there in (rows.ids_NT, rows.positions_NT):
            sizes.pop(there.untyped_storage().data_ptr(), None)
        self.num_bytes = sum(sizes.values())
        """of memory that their tensors are in"""

    def call(self, index: int, hidden_BTD: Tensor) -> BlockInputs:
        """The call of block `index` for the batch, whose hidden states there are `hidden_BTD`."""
        return BlockInputs(hidden_BTD, *self._each[index])


_CONSTANT = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """Values, and what tuples among them hold."""
    for value in values:
        if isinstance(value, tuple):
            yield from _leaves(value)
        else:
            yield value


class StopForward(Exception):
    """Ends a forward that has come as far as it was wanted."""


@contextmanager
def first_block_alone(model: nn.Module) -> Iterator[None]:
    """A model of one block while this lasts: its first.

    What holds for how blocks are called, and for what comes before and after them, can be tried
    this way on a model whose other blocks have no weights.
    """
    name, blocks = find_blocks(model)
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, leaf, nn.ModuleList([blocks[0]]))
    try:
        yield
    finally:
        setattr(owner, leaf, blocks)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode while this lasts; then in the mode that each had."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was_training in zip(models, modes, strict=True):
            model.train(was_training)


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a block returned (the block's tensor, or first of a tuple)."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise InputError(f"a decoder block returned {type(hidden).__name__}, expected a tensor")
    return hidden


class BlockCalls:
    """The calls that a model makes of its blocks, without the blocks being computed.

    What a block is given beside the hidden states (positions, masks) may differ from block to
    block (sliding and full attention, for example) and from batch to batch (where documents
    begin), but never depends on the hidden states themselves. So the model's forward is run with
    blocks that hand through what they get, up to the block asked for: its weights need not be
    there. That forward costs the embedding, masks and rotary angles, and some waits for the device;
    `all` has one for all blocks. Meanwhile other threads can run blocks as they are.

    Args:
        model: a transformers decoder; what comes before the blocks must hold its weights.
        blocks: its list of blocks, from `find_blocks`.
        more: from rows to what the model is given beside them; None: nothing.
    """

    def __init__(
        self, model: nn.Module, blocks: nn.ModuleList,
        more: Callable[[TokenRows], dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self._more = more
        self._blocks = blocks
        self._rest: tuple[None, ...] | None = None
        """what comes after the hidden states in a block's answer; None: it answers a tensor"""
        self._is_known = False
        self._lock = threading.Lock()

    def first(self, rows: TokenRows) -> BlockInputs:
        """The call of the first block for a batch (B rows of T tokens).

        Raises:
            InputError: the forward never reaches the first block, or calls it without hidden
                states.
        """
        return self._run(0, rows)[0]

    def call(self, index: int, rows: TokenRows, hidden_BTD: Tensor) -> BlockInputs:
        """The call of block `index` for a batch whose hidden states there are `hidden_BTD`.

        Raises:
            InputError: a block is not called exactly once, in order, on the output of the one
                before; then blocks cannot be pruned one after another.
        """
        found = self._run(index, rows)[-1]
        return BlockInputs(hidden_BTD, found.args, found.kwargs)

    def all(self, rows: TokenRows) -> tuple[Tensor, BlockArguments]:
        """The first block's hidden states for a batch, (B, T, D), and the arguments of all blocks.

        Raises:
            InputError: see `first` and `call`.
        """
        found = self._run(len(self._blocks) - 1, rows)
        return found[0].hidden_BTD, BlockArguments(found, rows)

    def learn(self, block: nn.Module, rows: TokenRows) -> None:
        """See on a few rows what a block returns (a tensor, or a tuple that begins with one).

        Raises:
            InputError: the forward calls a block again after the last one, or passes over one.
        """
        call = self.first(rows)
        output = block(call.hidden_BTD, *call.args, **call.kwargs)
        self._rest = (None,) * (len(output) - 1) if isinstance(output, tuple) else None
        self._is_known = True
        head: Any = self._model.get_output_embeddings()  # type: ignore[operator]
        # Its weights may not be there, and its logits would take memory.
        stop = None if head is None else head.register_forward_pre_hook(_stop_forward)
        try:
            self._run(len(self._blocks), rows)
        finally:
            if stop is not None:
                stop.remove()

    def _run(self, index: int, rows: TokenRows) -> list[BlockInputs]:
        """One forward that ends at block `index`, the blocks before it answering at once: the
        calls of these blocks and its own.

        With the number of blocks as `index` it comes to its end.
        """
        with self._lock:
            return self._run_alone(index, rows)

    def _run_alone(self, index: int, rows: TokenRows) -> list[BlockInputs]:
        name, caller = type(self._model).__name__, threading.get_ident()
        expected: list[Tensor] = []
        found: list[BlockInputs] = []

        def answer(at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = _split_hidden(args, kwargs, name)
            if at != len(expected) or (at and call.hidden_BTD is not expected[-1]):
                raise InputError(
                    f"{name}: block {at} is not called once, on the output of the block before "
                    "it; models that compute something between blocks cannot be pruned"
                )
            found.append(call)
            if at == index:
                raise StopForward
            assert self._is_known, "learn() comes before call()"
            # A new tensor each time, so that the check above knows whose output came in.
            passed = call.hidden_BTD.view_as(call.hidden_BTD)
            expected.append(passed)
            return passed if self._rest is None else (passed, *self._rest)

        def stand_in(at: int, block: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != caller:
                    return type(block).forward(block, *args, **kwargs)
                return answer(at, args, kwargs)

            return forward

        try:
            for at, block in enumerate(self._blocks):
                object.__setattr__(block, "forward", stand_in(at, block))
            device = next(p for p in self._model.parameters() if p.device.type != "meta").device
            rows = rows.to(device)
            more = {} if self._more is None else self._more(rows)
            run_model(self._model, rows, **more)
        except StopForward:
            pass
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)
        num_wanted = min(index + 1, len(self._blocks))
        if len(found) < num_wanted:
            raise InputError(
                f"{name}: its forward called only {len(found)} of {num_wanted} blocks; models "
                "that skip blocks cannot be pruned block by block"
            )
        return found


def _stop_forward(*_: Any) -> None:
    raise StopForward


def run_model(model: nn.Module, rows: TokenRows, **more: Any) -> Any:
    """What a transformers decoder returns for rows (N, T) on its device, their documents apart."""
    return model(input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False, **more)


def logits_of(model: nn.Module, rows: TokenRows) -> Tensor:
    """(N, T, V) logits of `rows`, which go to the model's device."""
    logits: Tensor = run_model(model, rows.to(next(model.parameters()).device)).logits
    return logits


def run_block(block: nn.Module, inputs: BlockInputs) -> Tensor:
    """The hidden states that `block` makes of `inputs`, (B, T, D)."""
    return hidden_of(block(inputs.hidden_BTD, *inputs.args, **inputs.kwargs))


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], model_name: str) -> BlockInputs:
    """Take the hidden states out of a block's arguments, by position or by keyword."""
    rest = dict(kwargs)
    hidden = args[0] if args else rest.pop("hidden_states", None)
    if not isinstance(hidden, Tensor):
        raise InputError(
            f"{model_name}: a decoder block was called without hidden states as its first "
            "argument or as hidden_states="
        )
    return BlockInputs(hidden, tuple(args[1:]), rest)
