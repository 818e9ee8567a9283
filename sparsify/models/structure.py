"""Where a model's decoder blocks are, what they are called with, and which linears share an input.

Works from the module tree and one traced forward, never from the name of a model family. Shape
suffixes: B rows, T tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import InputError


@dataclass(frozen=True)
class BlockInputs:
    """One call of a decoder block: its hidden states and everything else it was given."""

    hidden_BTD: Tensor
    args: tuple[Any, ...]
    """positional arguments after the hidden states"""
    kwargs: dict[str, Any]


class _Enough(Exception):
    """Ends a forward that has shown all it was run for."""


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


def _is_block_list(modules: nn.ModuleList) -> bool:
    classes = {type(module) for module in modules}
    return len(classes) == 1 and all(linears_of(module) for module in modules)


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear inside `block` by its dotted name relative to the block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a block returned (the block's tensor, or first of a tuple)."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise InputError(f"a decoder block returned {type(hidden).__name__}, expected a tensor")
    return hidden


def run_block(block: nn.Module, inputs: BlockInputs) -> Tensor:
    """The hidden states that `block` makes of `inputs`, (B, T, D)."""
    return hidden_of(block(inputs.hidden_BTD, *inputs.args, **inputs.kwargs))


def capture_block_inputs(
    model: nn.Module, blocks: nn.ModuleList, batches: list[Tensor]
) -> list[BlockInputs]:
    """What the first block is called with for each batch; nothing after that call is computed.

    Args:
        model: a transformers decoder.
        blocks: its list of blocks, from `find_blocks`.
        batches: int64 token ids (B, T) without padding.

    Returns:
        One `BlockInputs` per batch, on the model's device.

    Raises:
        InputError: the forward never reaches the first block, or calls it without hidden states.
    """
    return [_record_calls(model, blocks, batch, last=0)[0] for batch in batches]


def capture_block_calls(
    model: nn.Module, blocks: nn.ModuleList, batch: Tensor
) -> list[BlockInputs]:
    """What every block is called with for one batch, from one forward that ends after the blocks.

    The arguments beside the hidden states may differ from block to block (sliding and full
    attention take different masks, for example) but depend on the batch only through its shape.

    Raises:
        InputError: a block is not called exactly once, in order, on the output of the one before;
            then blocks cannot be pruned one after another.
    """
    return _record_calls(model, blocks, batch, last=len(blocks) - 1)


def _record_calls(
    model: nn.Module, blocks: nn.ModuleList, batch: Tensor, last: int
) -> list[BlockInputs]:
    calls: list[BlockInputs] = []
    outputs: list[Tensor] = []
    handles: list[RemovableHandle] = []
    model_name = type(model).__name__

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _split_hidden(args, kwargs, model_name)
        if index != len(calls) or (index and call.hidden_BTD is not outputs[-1]):
            raise InputError(
                f"{model_name}: block {index} is not called once, on the output of the block "
                "before it; models that compute something between blocks cannot be pruned"
            )
        calls.append(call)
        if index == last:
            raise _Enough

    def watch(index: int, block: nn.Module) -> None:
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs: before(index, args, kwargs), with_kwargs=True
            )
        )
        handles.append(
            block.register_forward_hook(lambda _, __, output: outputs.append(hidden_of(output)))
        )

    for index, block in enumerate(blocks):
        watch(index, block)
    try:
        device = next(model.parameters()).device
        model(input_ids=batch.to(device), use_cache=False)
    except _Enough:
        return calls
    finally:
        for handle in handles:
            handle.remove()
    raise InputError(
        f"{model_name}: its forward called only {len(calls)} of {last + 1} blocks; models that "
        "skip blocks cannot be pruned block by block"
    )


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
