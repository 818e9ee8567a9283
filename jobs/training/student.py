"""The student of a recovery, made ready one block at a time; what its teacher shares of that.

Where the weights of a model end up split over the workers (ZeRO-3, a sharded teacher), they are
read and split block by block: no worker ever holds the whole of a model that would not fit.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.runtime.worker import WorkerContext
from conf.options.training import TrainingConfig
from conf.schema import Config
from jobs.training.engine import Partitioner
from jobs.training.zero import masks_at_step
from sparsify.costs.flops import ModelFlops, count_flops
from sparsify.errors import InputError
from sparsify.formats.sparse_folder import kept_layers
from sparsify.formats.verify import masks_of, own_masks
from sparsify.masks.storage import BitMasks
from sparsify.models.blocks import Blocks, BlocksInMemory, BlocksOnDisk, reason_to_hold_whole
from sparsify.models.calls import first_block_alone
from sparsify.models.experts import expert_layers
from sparsify.models.isolation import check_isolation
from sparsify.models.lm_head import LanguageHead, check_head
from sparsify.models.load import DTYPES, check_vocabulary, load_model, load_tokenizer, read_config
from sparsify.models.masked import apply_masks_, infer_block_masks, mask_gradients, num_alive
from sparsify.models.training import compile_layers, prepare_student, recompute_layers
from sparsify.models.varlen_check import choose_attention
from sparsify.pattern import Pattern
from sparsify.rotation.basis import Rotation, fold_rotation
from sparsify.training.moving_masks import MovingMasks


@dataclass
class Student:
    """A model ready for the engine: its zeros in place, and gradients masked if hooks do it."""

    model: Any
    head: LanguageHead
    masks: BitMasks
    pattern: Pattern
    moving: MovingMasks | None
    """lets the masks move for a part of the run; None where they stay"""
    flops: ModelFlops | None
    """None where they cannot be counted"""
    kept_layers: list[int] | None = None
    """layers of the teacher that it still has; None: all of them"""


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
        reason = reason_to_hold_whole(path)
        if reason is None:
            return BlocksOnDisk(path, dtype, context.device, with_head=True)
        context.warn(f"{path}: {reason}; {why_whole} splits it after it was loaded whole")
    return BlocksInMemory(load_model(path, dtype, context.device))


def prove(
    source: Blocks, settings: TrainingConfig, isolate: bool, context: WorkerContext
) -> LanguageHead:
    """Try a causal language model of which at least the first block is open.

    Its head has to be what it seems, it has to keep documents apart, and it attends by document
    from here on if `distill.attention` has it so. All blocks of a model in memory take part, of one
    that is read block by block the first.

    Args:
        source: of the model.
        settings: for `attention` and `precision`.
        isolate: whether documents of a row have to be kept apart.
        context: this worker; is told why a model does not attend by document.

    Raises:
        InputError: see `check_head`, `check_isolation` and `choose_attention`.
    """
    is_streamed = isinstance(source, BlocksOnDisk)
    with first_block_alone(source.model) if is_streamed else nullcontext():
        found = check_head(source.model)
        if isolate:
            check_isolation(source.model)
        in_half = settings.precision == "bf16"
        choose_attention(source.model, settings.attention, isolate, in_half, context.warn)
    return found


def make_student(
    source: Blocks, masks: BitMasks | None, pattern: Pattern, config: Config,
    context: WorkerContext, split: Partitioner | None = None, is_cut: bool = True,
) -> Student:  # fmt: skip
    """Make a student of blocks, one after another.

    Args:
        source: of the model.
        masks: keep masks; None: read from the zeros of the weights, or where they are not to be
            cut, those of their largest.
        pattern: of the masks.
        config: of the run.
        context: this worker.
        split: called with every block when it is ready; None: the blocks stay whole.
        is_cut: whether weights under the masks are set to zero; else they stay, and masks move.

    Raises:
        InputError: see `prove`, `infer_masks` and `mask_gradients`.
    """
    settings, model = config.distill, source.model
    flops = flops_of(model, context)
    model.requires_grad_(True)
    prepare_student(model)
    recompute_layers(model, settings.recompute_share, settings.recompute)
    moving = None
    if settings.moving_share:
        moving = MovingMasks(
            model, {}, pattern, settings.mask_decay, has_hooks=not masks_at_step(settings)
        )
    held: dict[str, torch.Tensor] = {}
    shapes: dict[str, Any] = {}
    found, num_kept_alive = None, 0
    for index in range(len(source.blocks)):
        block = source.open(index).requires_grad_(True)
        found = found or prove(source, settings, config.data.isolate_documents, context)
        prefix = f"{source.list_name}.{index}"
        if masks is None:
            skip = config.prune.skip
            own = BitMasks.of(infer_block_masks(prefix, block, pattern, skip, not is_cut))
        else:
            own = masks.within(prefix)
        if is_cut:
            apply_masks_(model, own)
        else:
            num_kept_alive += num_alive(model, own)
        if moving is not None:
            moving.add(model, own)
        elif not masks_at_step(settings):
            mask_gradients(model, own)  # before ZeRO takes the parameters apart
        held.update(own.bits)
        shapes.update(own.shapes)
        if split is not None:
            split(block)
    if masks is not None and len(held) < len(masks):
        name = min(masks.bits.keys() - held.keys())
        raise InputError(
            f"mask of layer {name}: the model has no such layer in its blocks; masks and model are "
            "of different runs"
        )
    if num_kept_alive:
        share = num_kept_alive / sum(math.prod(shape) for shape in shapes.values())
        context.say(
            f"distill: starts with dense weights: {share:.1%} of those of {len(held)} layers are "
            "alive under their masks, and are cut when masks stay"
        )
    if settings.compile:
        compile_layers(model)
        if settings.recompute_share and any(map(expert_layers, source.blocks)):
            context.warn(
                "distill.compile: torch does not compile blocks with experts that are recomputed; "
                "they run as they are"
            )
    assert found is not None, "a list of blocks is never empty"
    return Student(model, found, BitMasks(held, shapes), pattern, moving, flops)


def flops_of(model: Any, context: WorkerContext) -> ModelFlops | None:
    """What the model multiplies, or None, said once, where that is not known."""
    try:
        return count_flops(model)
    except InputError as error:
        context.warn(str(error))
        return None


def layers_of_teacher(student: Path, teacher: Path) -> list[int] | None:
    """The layers of the teacher that a student has; None where none was dropped between the two.

    Raises:
        InputError: the teacher is not the model that layers were dropped of.
    """
    kept = kept_layers(student)
    num_layers = read_config(teacher).get_text_config().num_hidden_layers
    if kept is None or num_layers == len(kept):
        return None
    if num_layers <= max(kept):
        raise InputError(
            f"model.teacher={teacher}: has {num_layers} layers, and {student} has layer "
            f"{max(kept)} of the model that it comes from; use that one as the teacher"
        )
    return kept


def load_student(
    folder: Path, dense: Path, rotation: Path | None, config: Config, context: WorkerContext,
    split: Partitioner, keeps_all: bool = False,
) -> Student:  # fmt: skip
    """The model to train, ready for the engine.

    What its masks prune is set to zero. Where masks move, dense weights stay as they are under
    them: those of the dense model, and those of a model that was given without masks, whose
    largest weights are the first mask.

    Args:
        folder: the model that the recovery was given; its masks are its own, or what its zeros say.
        dense: the dense model; the student has its weights where `distill.moving_start` is dense.
        rotation: file of the rotation that brings it into the basis of `folder`; None for none.
        config: of the run.
        context: this worker.
        split: splits the blocks over the workers; where it has to, they are read one by one.
        keeps_all: whether the model is dense and stays so, without masks.

    Raises:
        InputError: masks stay, and the model has none and does not fit prune.pattern; or the model,
            its head or its masks are not what a recovery can train.
    """
    settings = config.distill
    is_moving, is_dense = settings.moving_share > 0, settings.moving_start == "dense"
    path, turns = (dense, rotation) if is_dense else (folder, None)
    # Weights have the type of the arithmetic from the start, of which DeepSpeed makes its masters:
    # float32 would only take twice the memory of host and GPU. Rotations are folded in float32.
    dtype = "bfloat16" if settings.precision == "bf16" else "float32"
    if turns is None:
        source = open_blocks(path, dtype, context, split.is_needed, "distill.zero_stage=3")
    else:
        source = open_blocks(path, "float32", context, False, "")
        fold_rotation(source.model.eval(), Rotation.load(turns))
        for param in source.model.parameters():
            param.data = param.data.to(DTYPES[dtype])
    check_vocabulary(source.model, load_tokenizer(path), str(path))  # type: ignore[arg-type]
    masks, pattern = own_masks(folder, config.prune.pattern)
    if keeps_all:
        masks = BitMasks({}, {})
    is_cut = not is_moving or (masks is not None and not is_dense)
    if masks is None and is_dense:
        pruned = load_model(folder, "float32", context.device)
        masks, _ = masks_of(
            folder, pruned, config.prune.pattern, config.prune.skip, may_be_dense=True
        )
    student = make_student(source, masks, pattern, config, context, split, is_cut)
    student.kept_layers = layers_of_teacher(folder, dense)
    return student
