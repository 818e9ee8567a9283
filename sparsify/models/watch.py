"""Forward hooks that show a block's linear layers: their inputs, outputs and residual additions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from sparsify.errors import InputError
from sparsify.models.calls import BlockInputs, run_block
from sparsify.models.structure import linears_of


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

    with watch_inputs(wanted, note):
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


def watch_inputs(
    linears: dict[str, nn.Linear], note: Callable[[str, Tensor], None]
) -> AbstractContextManager[None]:
    """Call `note(name, input tensor)` before every forward of the given linears."""
    return hooked(
        linear.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, linear in linears.items()
    )


def watch_outputs(
    modules: Mapping[str, nn.Module], note: Callable[[str, Tensor], None]
) -> AbstractContextManager[None]:
    """Call `note(name, output tensor)` after every forward of the given modules."""
    return hooked(
        module.register_forward_hook(lambda _, __, out, name=name: note(name, out))
        for name, module in modules.items()
    )


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are registered at the entry and removed at the end."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
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
