"""Where a recovery begins: whose weights the student has, and behind which masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._gate import masks_of
from jobs._stage import MASKS
from sparsify.masks import apply_masks_, num_alive
from sparsify.models.load import load_model, load_pair
from sparsify.rotation import Rotation, fold_rotation

if TYPE_CHECKING:
    import torch

    from cluster.ray_backend import WorkerContext
    from conf.schema import Config
    from sparsify.pattern import Pattern


def load_student(
    config: Config, folder: Path, dense: Path, rotation: Path | None, device: str
) -> tuple[Any, Any]:
    """The model to train, in float32, and its tokenizer.

    Args:
        config: `distill.moving_start` says whose weights.
        folder: the model that the recovery was given.
        dense: the dense model.
        rotation: file of the rotation that brings it into the basis of `folder`; None for none.
        device: where to.
    """
    if config.distill.moving_start == "given":
        return load_pair(folder, "float32", device)
    student, tokenizer = load_pair(dense, "float32", device)
    if rotation is not None:
        fold_rotation(student.eval(), Rotation.load(rotation))
    return student, tokenizer


def first_masks_(
    config: Config, folder: Path, student: Any, context: WorkerContext
) -> tuple[dict[str, torch.Tensor], Pattern]:
    """The masks to begin with, and their pattern; what they prune is set to zero in `student`.

    Where masks move, dense weights stay as they are behind them: those of the dense model, and
    those of a model that was given without masks, whose largest weights are the first mask.

    Raises:
        InputError: masks stay, and the model has none and does not fit the pattern.
    """
    settings = config.distill
    is_moving, is_dense = settings.moving_share > 0, settings.moving_start == "dense"
    has_masks = (folder / MASKS).is_file()
    source = student
    if is_dense and not has_masks:
        source = load_model(folder, "float32", context.device)
    masks, pattern = masks_of(folder, source, config.prune, may_be_dense=is_moving)
    if not is_moving or (has_masks and not is_dense):
        apply_masks_(student, masks)
    elif alive := num_alive(student, masks):
        share = alive / sum(mask.numel() for mask in masks.values())
        context.warn(
            f"distill: begins with dense weights: {share:.1%} of those of {len(masks)} layers are "
            "alive behind their masks, and are cut when masks stay"
        )
    return masks, pattern
