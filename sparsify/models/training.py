"""A model made ready to train: no dropout, and what trades memory for time, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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


def recompute_layers(model: nn.Module, share: float) -> list[int]:
    """Let a share of the decoder blocks run again in the backward pass instead of keeping their
    activations.

    Args:
        model: a causal LM of transformers.
        share: 0 (none) to 1 (all); rounded to whole blocks, spread evenly over the depth.

    Returns:
        Indices of the blocks.

    Raises:
        InputError: the model's blocks cannot be recomputed.

    Cost: one more forward of each of these blocks per backward, a quarter of its arithmetic.
    """
    name, blocks = find_blocks(model)
    chosen = evenly_spread(len(blocks), round(share * len(blocks)))
    if not chosen:
        return []
    if not all(hasattr(block, "gradient_checkpointing") for block in blocks):
        raise InputError(
            f"distill.recompute_share={share}: the blocks of {type(model).__name__} ({name}) "
            "cannot be recomputed; use 0"
        )
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # its name until transformers 5.23 at the latest, deprecated since
        enable = model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for index, block in enumerate(blocks):
        block.gradient_checkpointing = index in chosen  # type: ignore[assignment]
    return chosen


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
