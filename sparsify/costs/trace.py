"""One forward of a model that has no weights, followed on the meta device.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import AttentionInterface

from sparsify.costs.flops import num_active_experts
from sparsify.errors import first_line
from sparsify.models.experts import RoutedExperts, ScaledExperts, expert_layers
from sparsify.models.structure import linears_of
from sparsify.models.training import puts_out_kept
from sparsify.models.watch import watch_inputs

_TOKENS = 64  # what is kept grows in proportion

_COUNTED = "counted"


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers of a block that share an input."""

    layers: tuple[tuple[int, int], ...]
    """(O, I) of each"""
    num: int = 1
    """how many such groups there are: one in each expert, otherwise 1"""
    share: float = 1.0
    """of the tokens, what one of them meets on average"""

    @property
    def num_inputs(self) -> int:
        """I, which they share."""
        return self.layers[0][1]

    @property
    def num_outputs(self) -> int:
        """O of all of them together."""
        return sum(rows for rows, _ in self.layers)


@dataclass(frozen=True)
class Traced:
    """What following one forward showed; see the fields of `shapes.ModelShape`."""

    groups: list[LayerGroup]
    kept: dict[int, float]
    put_out: dict[int, tuple[float, float]]
    num_kernels: int
    untraced: str | None


def trace(model: Any, blocks: nn.ModuleList) -> Traced:
    """Follow a forward of a model on the meta device in both types.

    Args:
        model: in transformers' form, its experts apart (`unfuse.unfuse_experts`).
        blocks: of it.

    Cost: two forwards of 64 tokens that compute nothing.
    """
    block = next((block for block in blocks if expert_layers(block)), blocks[0])
    in_experts = expert_layers(block)
    linears = {name: layer for name, layer in linears_of(block).items() if name not in in_experts}
    given = model.config._attn_implementation
    keys: dict[str, tuple[int, int]] = {}
    held: list[Tensor] = []

    def note(name: str, value: Tensor) -> None:
        held.append(value)  # so that no later one gets its identity
        keys.setdefault(name, (id(value), value._version))

    kept: dict[int, float] = {}
    put_out: dict[int, tuple[float, float]] = {}
    untraced, num_kernels = None, 0
    try:
        model.config._attn_implementation = _COUNTED
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype).train()
            with watch_inputs(linears, note), _counting(blocks) as tally:
                ids_BT = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
                try:
                    model.base_model(input_ids=ids_BT, use_cache=False)
                except Exception as error:  # whatever the family's own code raises
                    untraced = f"{type(error).__name__}: {first_line(error)}"
                    continue
            own = {p.untyped_storage()._cdata for p in model.parameters()}
            total = sum(n for place, n in tally.storages.items() if place not in own)
            kept[dtype.itemsize] = total / _TOKENS
            put_out[dtype.itemsize] = tally.put_out / _TOKENS, tally.unneeded / _TOKENS
            num_kernels = tally.num_kernels
    finally:
        model.config._attn_implementation = given
    for name, layer in linears.items():  # behind what could not be traced
        keys.setdefault(name, (-layer.in_features, 0))
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for name, key in keys.items():
        found.setdefault(key, []).append((linears[name].out_features, linears[name].in_features))
    groups = [LayerGroup(tuple(layers)) for layers in found.values()]
    experts = _expert_groups(model, block)
    return Traced(groups + experts, kept, put_out, num_kernels, untraced)


def widest_of(blocks: nn.ModuleList, groups: list[LayerGroup]) -> float:
    """See `shapes.ModelShape.widest`."""
    widest = max(group.share * side for group in groups for layer in group.layers for side in layer)
    for module in blocks.modules():
        if isinstance(module, RoutedExperts):
            num_experts = len(list(module.children()))
            # Llama 4 hands every token to every expert.
            share = 1.0 if isinstance(module, ScaledExperts) else groups[-1].share
            widest = max(widest, share * num_experts * groups[-1].num_outputs)
    return widest


def _expert_groups(model: Any, block: nn.Module) -> list[LayerGroup]:
    """Of the layers in a block's experts: those that read what the router sends, and the others."""
    kinds: dict[tuple[bool, int], dict[str, tuple[int, int]]] = {}
    experts = expert_layers(block)
    num = len({id(layer.expert) for layer in experts.values()})
    for name, layer in experts.items():
        linear: Any = block.get_submodule(name)
        shape = linear.out_features, linear.in_features
        kinds.setdefault((not layer.reads_input, shape[1]), {})[layer.kind] = shape
    if not num:
        return []
    share = num_active_experts(model.config.get_text_config(), type(model).__name__) / num
    return [LayerGroup(tuple(kinds[key].values()), num, share) for key in sorted(kinds)]


class _Attention(torch.autograd.Function):
    """Attention as flash kernels keep it, without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_zeros(*query.shape[:3], value.shape[-1])
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError  # nothing is computed here


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **others: Any
) -> tuple[Tensor, None]:
    output: Tensor = _Attention.apply(query, key, value)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_COUNTED, _attend)


class _Tally(TorchDispatchMode):
    """What blocks keep while they run: bytes of storages, and of what products put out."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        """storage -> bytes, of all that is kept for a backward"""
        self.num_kernels = 0
        """operations of the whole forward that are no views: each is a kernel on a GPU"""
        self.put_out = 0
        self.is_inside = False
        """whether a block runs"""
        self.unneeded = 0
        """of `put_out`, what no backward needs"""
        self._waiting = 0
        self._held: list[Any] = []

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **others: Any
    ) -> tuple[Tensor, None]:
        """In the place of attention."""
        output = _attend(module, query, key, value)[0]
        heads = output.numel() // output.shape[-1]
        self._made(output.nbytes + 4 * heads)
        return output, None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returned = [value.alias_info for value in func._schema.returns]
        self.num_kernels += not any(alias is not None and not alias.is_write for alias in returned)
        if self.is_inside and puts_out_kept(func):
            self._made(sum(one.nbytes for one in tree_leaves(out) if isinstance(one, Tensor)))
        return out

    def _made(self, num_bytes: int) -> None:
        self.put_out += num_bytes
        self._waiting += num_bytes

    def pack(self, value: Tensor) -> Tensor:
        """Something is kept, for which all that was put out so far may have to be there."""
        if self.is_inside:
            storage = value.untyped_storage()
            self._held.append(storage)
            self.storages[storage._cdata] = storage.nbytes()
            self._waiting = 0
        return value

    def enter(self, *_: Any) -> None:
        """A block begins."""
        self.is_inside, self._waiting = True, 0

    def leave(self, *_: Any) -> None:
        """A block ends; what it has put out since it last kept something is never asked for."""
        self.is_inside = False
        self.unneeded += self._waiting


@contextmanager
def _counting(blocks: nn.ModuleList) -> Iterator[_Tally]:
    """What is kept for a backward while one of `blocks` runs."""
    tally = _Tally()
    AttentionInterface.register(_COUNTED, tally.attend)
    hooks = [block.register_forward_pre_hook(tally.enter) for block in blocks]
    hooks += [block.register_forward_hook(tally.leave) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(tally.pack, lambda value: value), tally:
            yield tally
    finally:
        AttentionInterface.register(_COUNTED, _attend)
        for hook in hooks:
            hook.remove()
