"""What a model weighs and keeps, read from its config alone.

The model is built without weights, on the meta device, and one forward of a few tokens is traced
there: nothing of it is computed, and everything of it is counted. So every family that transformers
has is counted by its own code, where a formula would know of Llamas alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import AttentionInterface

from sparsify.costs.flops import ModelFlops, count_flops, num_active_experts
from sparsify.errors import InputError, first_line
from sparsify.models.experts import RoutedExperts, ScaledExperts, expert_layers
from sparsify.models.structure import find_blocks, linears_of
from sparsify.models.unfuse import unfuse_experts
from sparsify.models.watch import watch_inputs

_TOKENS = 64  # traced; what is kept grows in proportion

_MOST_BLOCKS = 2000  # modules are built one by one: a slip of a few zeros would take hours

_COUNTED = "counted"

_COMPILED = 17.0 / 24.9


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
class ModelShape:
    """Sizes of a causal language model; numbers of elements unless a unit is named."""

    name: str
    """class of the model"""
    num_parameters: int
    """a weight that is used twice counts once"""
    num_blocks: int
    block_parameters: int
    """of the largest decoder block"""
    blocks_parameters: int
    """of all blocks together"""
    linear_parameters: int
    """weights of all linear layers of all blocks: what pruning takes"""
    head_parameters: int
    """weights of the output layer"""
    embedding_parameters: int
    """weights of the input embedding; the same as those of the head where they are tied"""
    is_tied: bool
    """whether head and embedding are one weight"""
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    """rows are no longer than this; None: no limit is known"""
    kv_width: int
    """elements of one token's keys and values over all layers"""
    groups: tuple[LayerGroup, ...]
    """of the first block, or the first with experts: layers that share an input, in order of
    execution; those in experts last"""
    flops: ModelFlops
    kept: dict[int, float]
    """bytes of an element of the weights (2 or 4) -> bytes that one token's forward of all blocks
    keeps for its backward, without compilation; attention keeps q, k, v, its output, and one
    float32 a head, as flash kernels do; a mixture's router sends as many tokens to every expert.
    Empty where `untraced` says why"""
    widest: float
    """features of the widest activation of a block, of an expert's those of the tokens that it
    meets on average; of a mixture at least what all experts make of one token"""
    num_kernels: int = 0
    """kernels of one forward of all blocks, by one operation after another"""
    untraced: str | None = None
    """why nothing is known of what a forward keeps; None: it is known"""

    @property
    def has_experts(self) -> bool:
        """Whether layers are in experts that pruning takes one by one; its forwards cannot pause at
        each group then, so that all of a block's layers are measured together."""
        return any(group.num > 1 for group in self.groups)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(O, I) of all layers of `groups`, those of every expert."""
        return [layer for group in self.groups for layer in group.num * group.layers]

    @property
    def outside_parameters(self) -> int:
        """Weights outside the blocks: embedding, head and the last norm."""
        return self.num_parameters - self.blocks_parameters


def read_shape(config: PretrainedConfig) -> ModelShape:
    """The sizes of the causal language model that a config describes.

    Args:
        config: of transformers, of any causal language model.

    Returns:
        The sizes.

    Raises:
        InputError: no causal language model, sizes of which none can be built, no list of decoder
            blocks, or a kind of layer whose work is not known (`flops.count_flops`).

    Cost: the model's modules without weights, and two forwards of 64 tokens that compute nothing:
    half a second for 80 blocks, half a minute for a mixture of 6,144 experts.
    """
    text = config.get_text_config()
    blocks_asked = getattr(text, "num_hidden_layers", 1)
    if not 1 <= blocks_asked <= _MOST_BLOCKS:
        raise InputError(f"config.json: num_hidden_layers={blocks_asked}: must be 1 to "
                         f"{_MOST_BLOCKS:,}")  # fmt: skip
    with torch.device("meta"):
        try:
            model: Any = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # whatever the family's own code raises
            raise InputError(
                f"config.json: no model can be built of it ({type(error).__name__}: "
                f"{first_line(error)})"
            ) from None
    unfuse_experts(model)  # as pruning and recovery do
    flops = count_flops(model)  # refuses what is no plain attention
    _, blocks = find_blocks(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    of_attention = getattr(text, "attn_config", None)  # DBRX
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(
        of_attention, "kv_n_heads", heads
    )
    traced = _trace(model, blocks)
    return ModelShape(
        name=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_blocks=len(blocks),
        block_parameters=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        blocks_parameters=sum(p.numel() for p in blocks.parameters()),
        linear_parameters=sum(
            layer.weight.numel() for block in blocks for layer in linears_of(block).values()
        ),
        head_parameters=head.weight.numel(),
        embedding_parameters=embedding.weight.numel(),
        is_tied=head.weight is embedding.weight,
        hidden_size=text.hidden_size,
        vocab_size=head.weight.shape[0],
        max_positions=getattr(text, "max_position_embeddings", None),
        kv_width=2 * len(blocks) * kv_heads * size,
        groups=tuple(traced.groups),
        flops=flops,
        kept=traced.kept,
        widest=_widest(blocks, traced.groups),
        num_kernels=traced.num_kernels,
        untraced=traced.untraced,
    )


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


class _Kernels(TorchDispatchMode):
    """Counts operations that are no views: each is a kernel on a GPU."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [value.alias_info for value in func._schema.returns]
        self.num += not any(alias is not None and not alias.is_write for alias in returned)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Traced:
    """What following one forward showed; see the fields of `ModelShape`."""

    groups: list[LayerGroup]
    kept: dict[int, float]
    num_kernels: int
    untraced: str | None


def _trace(model: Any, blocks: nn.ModuleList) -> _Traced:
    """Follow a forward in both types."""
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
    untraced, kernels = None, _Kernels()
    try:
        model.config._attn_implementation = _COUNTED
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype).train()
            kernels.num = 0
            with watch_inputs(linears, note), _counting(blocks) as storages:
                ids_BT = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
                try:
                    with kernels:
                        model.base_model(input_ids=ids_BT, use_cache=False)
                except Exception as error:  # whatever the family's own code raises
                    untraced = f"{type(error).__name__}: {first_line(error)}"
                    continue
            own = {p.untyped_storage()._cdata for p in model.parameters()}
            total = sum(n for place, n in storages.items() if place not in own)
            kept[dtype.itemsize] = total / _TOKENS
    finally:
        model.config._attn_implementation = given
    for name, layer in linears.items():  # behind what could not be traced
        keys.setdefault(name, (-layer.in_features, 0))
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for name, key in keys.items():
        found.setdefault(key, []).append((linears[name].out_features, linears[name].in_features))
    groups = [LayerGroup(tuple(layers)) for layers in found.values()]
    return _Traced(groups + _expert_groups(model, block), kept, kernels.num, untraced)


def _widest(blocks: nn.ModuleList, groups: list[LayerGroup]) -> float:
    """See `ModelShape.widest`."""
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


@contextmanager
def _counting(blocks: nn.ModuleList) -> Iterator[dict[int, int]]:
    """Bytes by storage of all that is kept for a backward while one of `blocks` runs."""
    storages: dict[int, int] = {}
    held: list[Any] = []
    is_inside = False

    def pack(value: Tensor) -> Tensor:
        if is_inside:
            storage = value.untyped_storage()
            held.append(storage)
            storages[storage._cdata] = storage.nbytes()
        return value

    def enter(*_: Any) -> None:
        nonlocal is_inside
        is_inside = True

    def leave(*_: Any) -> None:
        nonlocal is_inside
        is_inside = False

    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            yield storages
    finally:
        for hook in hooks:
            hook.remove()


def num_blocks_recomputed(num_blocks: int, share: float) -> int:
    """Decoder blocks that `distill.recompute_share` has recomputed."""
    return round(share * num_blocks)


def kept_of_token(shape: ModelShape, element_bytes: int) -> float:
    """Bytes a token keeps for the backward pass in all blocks, without compilation.

    Raises:
        InputError: the model could not be traced without values; says why.
    """
    if element_bytes not in shape.kept:
        raise InputError(
            f"{shape.name}: what its layers keep for the backward pass cannot be counted without "
            f"weights ({shape.untraced}); its training cannot be planned"
        )
    return shape.kept[element_bytes]


def kept_bytes(
    shape: ModelShape, element_bytes: int, share_recomputed: float, compiled: bool
) -> tuple[float, float]:
    """Bytes a token keeps for the backward pass in all blocks, and in one block run again there.

    A recomputed block keeps its input alone, and all of it for as long as its backward pass takes.
    A compiled block keeps what the min-cut partitioner leaves: `_COMPILED` of the eager bytes in
    half precision, counted for a Llama block (17.0 of 24.9 values of the hidden width); the same
    share is taken for float32.

    Raises:
        InputError: see `kept_of_token`.
    """
    share = _COMPILED if compiled else 1.0
    whole = share * kept_of_token(shape, element_bytes) / shape.num_blocks
    again = num_blocks_recomputed(shape.num_blocks, share_recomputed)
    inputs = again * shape.hidden_size * element_bytes
    return (shape.num_blocks - again) * whole + inputs, whole if again else 0.0
