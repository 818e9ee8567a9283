"""Where a model's decoder blocks are, what they are called with, and which linears share an input.

Works from the module tree and one traced forward, never from the name of a model family. Shape
suffixes: B rows, T tokens of a row, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsify.errors import InputError
from sparsify.text import TokenRows


@dataclass(frozen=True)
class BlockInputs:
    """One call of a decoder block: its hidden states and everything else it was given."""

    hidden_BTD: Tensor
    args: tuple[Any, ...]
    """positional arguments after the hidden states"""
    kwargs: dict[str, Any]


class Enough(Exception):
    """Ends a forward that has come as far as it was wanted."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's decoder blocks and the dotted name of their list.

    They are the longest list of modules of one class that contain nn.Linear; lists inside such a
    list (experts, for example) do not count, and the first of equally long lists wins.

    Raises:
        InputError: the model has no such list.
    """
    best: tuple[str, nn.ModuleList] | None = None
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not _is_block_list(module):
            continue
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        inside.append(name)
        if best is None or len(module) > len(best[1]):
            best = (name, module)
    if best is None:
        raise InputError(
            f"{type(model).__name__}: no list of equal blocks with nn.Linear layers was found; "
            "only models built as a list of decoder blocks of nn.Linear layers can be pruned"
        )
    return best


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


def _is_block_list(modules: nn.ModuleList) -> bool:
    classes = {type(module) for module in modules}
    return len(classes) == 1 and all(linears_of(module) for module in modules)


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear inside `block` by its dotted name relative to the block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def writers_of(linears: dict[str, nn.Linear], hidden_size: int) -> dict[str, nn.Linear]:
    """Those whose output is as wide as the residual stream, so that it may be added to it."""
    return {name: layer for name, layer in linears.items() if layer.out_features == hidden_size}


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
    there, and nothing has to be kept. Meanwhile other threads can run blocks as they are.

    Args:
        model: a transformers decoder; what comes before the blocks must hold its weights.
        blocks: its list of blocks, from `find_blocks`.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self._model = model
        self._blocks = blocks
        self._rest: tuple[None, ...] | None = None
        """what stands after the hidden states in a block's answer; None: it answers a tensor"""
        self._is_known = False
        self._lock = threading.Lock()

    def first(self, rows: TokenRows) -> BlockInputs:
        """The call of the first block for a batch (B rows of T tokens).

        Raises:
            InputError: the forward never reaches the first block, or calls it without hidden
                states.
        """
        return self._run(0, rows)

    def call(self, index: int, rows: TokenRows, hidden_BTD: Tensor) -> BlockInputs:
        """The call of block `index` for a batch whose hidden states there are `hidden_BTD`.

        Raises:
            InputError: a block is not called exactly once, in order, on the output of the one
                before; then blocks cannot be pruned one after another.
        """
        found = self._run(index, rows)
        return BlockInputs(hidden_BTD, found.args, found.kwargs)

    def learn(self, block: nn.Module, rows: TokenRows) -> None:
        """See on a few rows what a block returns (a tensor, or a tuple that begins with one)."""
        call = self.first(rows)
        output = block(call.hidden_BTD, *call.args, **call.kwargs)
        self._rest = (None,) * (len(output) - 1) if isinstance(output, tuple) else None
        self._is_known = True

    def _run(self, index: int, rows: TokenRows) -> BlockInputs:
        """One forward that ends at block `index`, the blocks before it answering at once."""
        with self._lock:
            return self._run_alone(index, rows)

    def _run_alone(self, index: int, rows: TokenRows) -> BlockInputs:
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
            if at == index:
                found.append(call)
                raise Enough
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
            self._model(input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False)
        except Enough:
            return found[0]
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)
        raise InputError(
            f"{name}: its forward called only {len(expected)} of {index + 1} blocks; models that "
            "skip blocks cannot be pruned block by block"
        )


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


def shared_input_groups(
    block: nn.Module, inputs: BlockInputs, leave_out: Collection[str] = ()
) -> list[list[str]]:
    """The linears of a block, those fed with the very same tensor together.

    One traced forward tells them: the query, key and value projections usually share an input,
    and so do the two up-projections of a gated MLP. Linears whose inputs are equal but different
    tensors land in different groups, which costs time but changes nothing.

    Args:
        block: a decoder block.
        inputs: one call of it.
        leave_out: names that are not wanted and need not be called.

    Returns:
        Names relative to the block, groups and members in order of execution.

    Raises:
        InputError: a linear is never called, so that no statistics of its input exist.
    """
    wanted = {name: linear for name, linear in linears_of(block).items() if name not in leave_out}
    seen: dict[str, list[Tensor]] = {}
    keys: dict[str, list[tuple[int, int]]] = {}

    def note(name: str, value: Tensor) -> None:
        # The tensor is kept, so that no later one can get its identity; the version tells apart
        # two states of a tensor that was changed in place.
        seen.setdefault(name, []).append(value)
        keys.setdefault(name, []).append((id(value), value._version))

    with watch_linears(wanted, note):
        run_block(block, inputs)
    idle = [name for name in wanted if name not in seen]
    if idle:
        raise InputError(
            f"linear layers {', '.join(idle)} of a {type(block).__name__} are never called in a "
            "forward, so no statistics of their inputs exist; leave them dense with prune.skip"
        )
    groups: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name in seen:
        groups.setdefault(tuple(keys[name]), []).append(name)
    return list(groups.values())


@contextmanager
def watch_linears(
    linears: dict[str, nn.Linear], note: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `note(name, input tensor)` before every forward of the given linears."""
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_outputs(
    linears: dict[str, nn.Linear], note: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `note(name, output tensor)` after every forward of the given linears."""
    handles = [
        linear.register_forward_hook(lambda _, __, out, name=name: note(name, out))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ResidualAdds(TorchFunctionMode):
    """Sees which linears' outputs are added to the residual stream, and to what.

    While the mode is active, a sum counts when one side is, as it is, an output announced by `saw`
    and the other is not: the residual stream before the layer's contribution. Sums of two layers'
    outputs (parallel attention and MLP) are no such case, nor is an output that is normalised or
    scaled first.
    """

    _ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})

    def __init__(self) -> None:
        super().__init__()
        self.onto: list[tuple[str, Tensor]] = []
        """(layer, the residual stream (..., D) that its output was added to), in order"""
        self.sums: list[Tensor] = []
        """what came out"""
        self._outputs: dict[int, tuple[str, Tensor]] = {}

    def saw(self, name: str, output: Tensor) -> None:
        """A layer's output; held so that no other tensor can get its identity."""
        self._outputs[id(output)] = (name, output)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self._ADDS and len(args) == 2 and not kwargs:
            hits = [self._outputs.get(id(arg)) for arg in args]
            if (hits[0] is None) != (hits[1] is None):
                at = 0 if hits[1] is None else 1
                name, output = hits[at]  # type: ignore[misc]
                other = args[1 - at]
                if isinstance(other, Tensor) and other.shape == output.shape:
                    self.onto.append((name, other))
                    self.sums.append(result)
        return result
