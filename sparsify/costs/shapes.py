"""What a model weighs and keeps, read from its config alone.

The model is built without weights, on the meta device, and one forward of a few tokens is traced
there: nothing of it is computed, and everything of it is counted. So every family that transformers
has is counted by its own code, where a formula would know of Llamas alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from sparsify.costs.flops import ModelFlops, count_flops
from sparsify.costs.layout import Recompute
from sparsify.costs.trace import LayerGroup, trace, widest_of
from sparsify.errors import InputError, first_line
from sparsify.models.structure import find_blocks, linears_of
from sparsify.models.unfuse import unfuse_experts

_MOST_BLOCKS = 2000  # modules are built one by one: a slip of a few zeros would take hours

_COMPILED = 17.0 / 24.9


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
    put_out: dict[int, tuple[float, float]]
    """the same keys -> bytes that products of matrices and attention put out for one token in all
    blocks; and the part of them that no backward needs, such as a block's last product's"""
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
    traced = trace(model, blocks)
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
        put_out=traced.put_out,
        widest=widest_of(blocks, traced.groups),
        num_kernels=traced.num_kernels,
        untraced=traced.untraced,
    )


def num_blocks_recomputed(num_blocks: int, share: float) -> int:
    """Decoder blocks that `distill.recompute_share` has recomputed."""
    return round(share * num_blocks)


def compiles(shape: ModelShape, compiled: bool, share_recomputed: float) -> bool:
    """Whether torch.compile has a say in what blocks keep.

    Where tokens go to experts it breaks a block in pieces, and a block that is recomputed and would
    break it leaves as it is.
    """
    return compiled and not (shape.has_experts and share_recomputed > 0)


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
    shape: ModelShape, element_bytes: int, share_recomputed: float, compiled: bool,
    recompute: Recompute = "whole",
) -> tuple[float, float]:  # fmt: skip
    """Bytes a token keeps for the backward pass in all blocks, and in one block run again there.

    A recomputed block keeps its input alone, and all of it for as long as its backward pass takes.
    Where only elementwise work is recomputed, it keeps what products and attention put out too;
    without compilation also what no backward asks for, as torch's selective checkpointing does.
    A compiled block keeps what the min-cut partitioner leaves: `_COMPILED` of the eager bytes in
    half precision, counted for a Llama block (17.0 of 24.9 values of the hidden width); the same
    share is taken for float32.

    Raises:
        InputError: see `kept_of_token`.
    """
    compiled = compiles(shape, compiled, share_recomputed)
    share = _COMPILED if compiled else 1.0
    whole = share * kept_of_token(shape, element_bytes) / shape.num_blocks
    again = num_blocks_recomputed(shape.num_blocks, share_recomputed)
    left, made = float(shape.hidden_size * element_bytes), whole
    if recompute == "elementwise":
        put_out, unneeded = shape.put_out[element_bytes]
        left += (put_out - compiled * unneeded) / shape.num_blocks
        made = max(0.0, whole - left) if compiled else whole  # of which it keeps some twice
    return (shape.num_blocks - again) * whole + again * left, made if again else 0.0
