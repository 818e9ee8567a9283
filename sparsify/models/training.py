"""A model made ready to train: no dropout, and what trades memory for time, layer by layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from sparsify.errors import InputError
from sparsify.models.structure import find_blocks


def prepare_student(student: nn.Module) -> None:
    """Training mode without dropout: the teacher, whose outputs are the target, has none."""
    student.train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def recompute_layers(model: nn.Module, share: float, recompute: str = "whole") -> list[int]:
    """Let a share of the decoder blocks make activations again in the backward pass instead of
    keeping them.

    `whole` keeps a block's input alone and runs all of it again (Chen et al. 2016, arXiv
    1604.06174). `elementwise` keeps what products of matrices and attention put out too
    (`puts_out_kept`), and makes again what is between them: norms, rotations, gates (Korthikanti et
    al. 2022, arXiv 2205.05198, choose what to keep by the same weighing). Gradients are the same,
    if no block changes in place what a linear layer put out.

    Args:
        model: a causal LM of transformers.
        share: 0 (none) to 1 (all); rounded to whole blocks, spread evenly over the depth.
        recompute: what of these blocks, whole or elementwise.

    Returns:
        Indices of the blocks.

    Raises:
        InputError: the model's blocks cannot be recomputed.

    Cost: per backward, of each of these blocks one more forward, a quarter of its arithmetic;
    elementwise, no product more, and a few passes over what is made again.
    """
    name, blocks = find_blocks(model)
    chosen = evenly_spread(len(blocks), round(share * len(blocks)))
    if not chosen:
        return []
    refusal = InputError(
        f"distill.recompute_share={share}: the blocks of {type(model).__name__} ({name}) "
        "cannot be recomputed; use 0"
    )
    if not all(hasattr(block, "gradient_checkpointing") for block in blocks):
        raise refusal
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # its name until transformers 5.23 at the latest, deprecated since
        enable = model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError:  # a family that has the blocks for it, and says that it cannot
        raise refusal from None
    for index, block in enumerate(blocks):
        block.gradient_checkpointing = index in chosen  # type: ignore[assignment]
        if recompute == "elementwise":
            # transformers' name for what runs a block; torch.compile wants a partial here.
            block._gradient_checkpointing_func = partial(  # type: ignore[assignment]
                checkpoint, use_reentrant=False,
                context_fn=partial(create_selective_checkpoint_contexts, elementwise_again),
            )  # fmt: skip
    return chosen


# Of linear layers. Those of a batch, `bmm`, are of attention without a kernel: T x T scores, which
# some families change in place afterwards, and torch does not always notice that in what it kept.
_PRODUCTS = {"mm", "addmm", "_grouped_mm"}

_ATTENTION = ("_scaled_dot_product_", "_varlen_attn")


def puts_out_kept(operation: Any) -> bool:
    """Whether an operation's results are kept where only elementwise work is made again.

    Args:
        operation: of torch, as a dispatch mode or a traced graph has it.
    """
    name = getattr(operation, "overloadpacket", operation).__name__
    return name in _PRODUCTS or (name.startswith(_ATTENTION) and "backward" not in name)


def elementwise_again(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """What torch's selective checkpointing asks of each operation of a block."""
    is_kept = puts_out_kept(operation)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def evenly_spread(num_items: int, num_chosen: int) -> list[int]:
    """`num_chosen` of range(num_items), as evenly spread as whole numbers allow."""
    return [(2 * i + 1) * num_items // (2 * num_chosen) for i in range(num_chosen)]


_MOST_VERSIONS = 32


def compile_layers(model: nn.Module) -> None:
    """torch.compile every decoder block by itself, in place; parameters keep their names.

    Blocks are alike, so the first one's code serves all of them. The whole model at once would
    break its graph at ZeRO's hooks. A student and its teacher share a block's code, in versions
    with and without gradients, recomputed or not, of one document or several: more than the 8 after
    which torch runs what is left uncompiled.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_VERSIONS)
    for block in find_blocks(model)[1]:
        torch.nn.Module.compile(block)
