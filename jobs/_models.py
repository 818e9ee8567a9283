"""Student and teacher of a recovery, made ready one block at a time.

Where the weights of a model end up split over the workers (ZeRO-3, a sharded teacher), they are
read and split block by block: no worker ever holds the whole of a model that would not fit.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jobs._gate import own_masks
from sparsify.errors import InputError
from sparsify.flops import ModelFlops, count_flops
from sparsify.masks import PackedMasks, apply_masks_, infer_block_masks, mask_gradients
from sparsify.models.blocks import Blocks, BlocksInMemory, StreamedBlocks, unstreamable
from sparsify.models.head import LanguageHead, check_head
from sparsify.models.load import check_vocabulary, load_model, load_tokenizer
from sparsify.models.packed import check_isolation
from sparsify.models.structure import first_block_alone
from sparsify.models.training import compile_layers, prepare_student, recompute_layers
from sparsify.models.varlen import choose_attention
from sparsify.moving import MovingMasks
from sparsify.pattern import Pattern

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from conf.schema import Config
    from conf.stages import DistillConfig
    from jobs._engine import Partitioner


@dataclass
class Student:
    """A model ready for the engine: its zeros in place, its gradients masked."""

    model: Any
    head: LanguageHead
    masks: PackedMasks
    pattern: Pattern
    moving: MovingMasks | None
    """lets the masks move for a part of the run; None where they stay"""
    flops: ModelFlops | None
    """None where they cannot be counted"""


def open_blocks(
    path: Path, dtype: str, context: WorkerContext, is_split: bool, why_whole: str
) -> Blocks:
    """The blocks of a model folder: one at a time where they are to be split, else all there.

    Args:
        path: model folder.
        dtype: of the weights.
        context: this worker; a checkpoint that cannot be read block by block is said to it.
        is_split: whether the weights will be split over the workers.
        why_whole: the option that asks for that, for the warning.
    """
    if is_split:
        reason = unstreamable(path)
        if reason is None:
            source = StreamedBlocks(path, dtype, context.device, with_head=True)
            for module in source.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(context.device)
            return source
        context.warn(f"{path}: {reason}; {why_whole} splits it after it was loaded whole")
    return BlocksInMemory(load_model(path, dtype, context.device))


def prove(
    source: Blocks, settings: DistillConfig, isolate: bool, context: WorkerContext
) -> LanguageHead:
    """The head of a causal language model, when at least its first block is open; and how the model
    keeps documents apart from now on.

    All blocks of a model in memory take part, of one that is read block by block the first.

    Args:
        source: of the model.
        settings: its attention.
        isolate: whether documents of a row have to be kept apart: proved too.
        context: this worker; told why a model does not attend by document.

    Raises:
        InputError: see `check_head`, `check_isolation` and `choose_attention`.
    """
    is_streamed = isinstance(source, StreamedBlocks)
    with first_block_alone(source.model) if is_streamed else nullcontext():
        found = check_head(source.model)
        if isolate:
            check_isolation(source.model)
        in_half = settings.precision == "bf16"
        choose_attention(source.model, settings.attention, isolate, in_half, context.warn)
    return found


def load_student(path: Path, config: Config, context: WorkerContext, split: Partitioner) -> Student:
    """The student of a model folder, ready for the engine.

    Args:
        path: model folder of a pruned model; its masks are its own, or what its zeros say.
        config: of the run.
        context: this worker.
        split: splits the blocks over the workers; where it has to, they are read one by one.

    Raises:
        InputError: no masks and no zeros that fit prune.pattern; or the model, its head or its
            masks are not what a recovery can train.
    """
    dtype = "float32"
    if split.is_needed and config.distill.precision == "bf16":
        dtype = "bfloat16"  # split weights have the type of the arithmetic from the start
    source = open_blocks(path, dtype, context, split.is_needed, "distill.zero_stage=3")
    check_vocabulary(source.model, load_tokenizer(path), str(path))  # type: ignore[arg-type]
    masks, pattern = own_masks(path, config.prune)
    return make_student(source, masks, pattern, config, context, split)


def make_student(
    source: Blocks, masks: PackedMasks | None, pattern: Pattern, config: Config,
    context: WorkerContext, split: Partitioner | None = None,
) -> Student:  # fmt: skip
    """`load_student` of blocks; masks are read from zeros where they are None."""
    settings, model = config.distill, source.model
    flops = flops_of(model, context)
    model.requires_grad_(True)
    prepare_student(model)
    recompute_layers(model, settings.recompute_share)
    moving = None
    if settings.moving_share:
        moving = MovingMasks(model, {}, pattern, settings.mask_decay)
    held: dict[str, torch.Tensor] = {}
    shapes: dict[str, Any] = {}
    found = None
    for index in range(len(source.blocks)):
        block = source.open(index).requires_grad_(True)
        found = found or prove(source, settings, config.data.isolate_documents, context)
        prefix = f"{source.list_name}.{index}"
        if masks is None:
            own = PackedMasks.of(infer_block_masks(prefix, block, pattern, config.prune.skip))
        else:
            own = masks.within(prefix)
        apply_masks_(model, own)
        if moving is not None:
            moving.add(model, own)
        else:
            mask_gradients(model, own)  # before ZeRO takes the parameters apart
        held.update(own.packed)
        shapes.update(own.shapes)
        if split is not None:
            split(block)
    if masks is not None and len(held) < len(masks):
        name = min(masks.packed.keys() - held.keys())
        raise InputError(
            f"mask of layer {name}: the model has no such layer in its blocks; masks and model are "
            "of different runs"
        )
    if settings.compile:
        compile_layers(model)
    assert found is not None, "a list of blocks is never empty"
    return Student(model, found, PackedMasks(held, shapes), pattern, moving, flops)


def flops_of(model: Any, context: WorkerContext) -> ModelFlops | None:
    """What the model multiplies, or None, said once, where that is not known."""
    try:
        return count_flops(model)
    except InputError as error:
        context.warn(str(error))
        return None
