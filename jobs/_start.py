"""Where a recovery begins: whose weights the student has, and behind which masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs._gate import masks_of, own_masks
from jobs._models import Student, make_student, open_blocks
from sparsify.models.load import DTYPES, check_vocabulary, load_model, load_tokenizer
from sparsify.rotation import Rotation, fold_rotation

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from conf.schema import Config
    from jobs._engine import Partitioner


def load_student(
    folder: Path, dense: Path, rotation: Path | None, config: Config, context: WorkerContext,
    split: Partitioner,
) -> Student:  # fmt: skip
    """The model to train, ready for the engine.

    What its masks prune is set to zero. Where masks move, dense weights stay as they are behind
    them: those of the dense model, and those of a model that was given without masks, whose
    largest weights are the first mask.

    Args:
        folder: the model that the recovery was given; its masks are its own, or what its zeros say.
        dense: the dense model; the student has its weights where `distill.moving_start` is dense.
        rotation: file of the rotation that brings it into the basis of `folder`; None for none.
        config: of the run.
        context: this worker.
        split: splits the blocks over the workers; where it has to, they are read one by one.

    Raises:
        InputError: masks stay, and the model has none and does not fit prune.pattern; or the model,
            its head or its masks are not what a recovery can train.
    """
    settings = config.distill
    is_moving, is_dense = settings.moving_share > 0, settings.moving_start == "dense"
    path, turns = (dense, rotation) if is_dense else (folder, None)
    # Split weights have the type of the arithmetic from the start, rotations are folded in float32.
    dtype = "bfloat16" if split.is_needed and settings.precision == "bf16" else "float32"
    if turns is None:
        source = open_blocks(path, dtype, context, split.is_needed, "distill.zero_stage=3")
    else:
        source = open_blocks(path, "float32", context, False, "")
        fold_rotation(source.model.eval(), Rotation.load(turns))
        for param in source.model.parameters():
            param.data = param.data.to(DTYPES[dtype])
    check_vocabulary(source.model, load_tokenizer(path), str(path))  # type: ignore[arg-type]
    masks, pattern = own_masks(folder, config.prune)
    is_cut = not is_moving or (masks is not None and not is_dense)
    if masks is None and is_dense:
        pruned = load_model(folder, "float32", context.device)
        masks, _ = masks_of(folder, pruned, config.prune, may_be_dense=True)
    return make_student(source, masks, pattern, config, context, split, is_cut)
