"""Which basis a model's hidden states lie in, and the rotation file that model folders carry.

Rotations folded in before pruning (prune.rotation_steps) leave a model's function as it was and its
hidden states in another basis. Its folder keeps the rotation, and its provenance says of which
model's basis it is; so does every folder made from it. With that the dense model can be brought
into the student's basis wherever the two are compared inside, whatever command does it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sparsify.errors import InputError
from sparsify.files import file_sha256
from sparsify.formats.sparse_folder import ROTATION, model_fingerprint, read_sparsity

_FILE_KEY = "rotation_sha256"

_MODEL_KEY = "rotated_model_sha256"


def rotation_facts(file: Path, model_sha256: str) -> dict[str, str]:
    """Entries for the provenance of a model that a rotation was folded into.

    Args:
        file: the rotation.
        model_sha256: fingerprint of the model as it was before.
    """
    return {_FILE_KEY: file_sha256(file), _MODEL_KEY: model_sha256}


def _facts_of(folder: Path) -> dict[str, str]:
    """Those entries of a model folder; {} when it is in the basis it was trained in."""
    provenance: dict[str, Any] = (read_sparsity(folder) or {}).get("provenance", {})
    return {key: provenance[key] for key in (_FILE_KEY, _MODEL_KEY) if key in provenance}


def carry_rotation(source: Path, target: Path) -> dict[str, str]:
    """Give a model folder the rotation of the one it was made from.

    Returns:
        The entries for its provenance; {} when the source is not rotated.

    Raises:
        InputError: the source's file is missing or changed.
    """
    facts = _facts_of(source)
    if facts:
        path = _checked_file(source, facts)
        (target / ROTATION).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / ROTATION)
    return facts


def teacher_rotation(
    student: Path, teacher: Path, square_head_weight: float, moving_start: str = "given",
    is_tuned: bool = False,
) -> Path | None:  # fmt: skip
    """The rotation that brings the teacher into the student's basis.

    Wanted where hidden states of the two are compared (`distill.square_head_weight`), and where
    the student begins with the dense model's weights (`distill.moving_start=dense`).

    Args:
        student, teacher: model folders.
        square_head_weight, moving_start: see above.
        is_tuned: whether the teacher may be a fine-tuned copy of the model that was rotated, which
            lies in that model's basis.

    Returns:
        The file; None when both are in one basis already, or neither is the case.

    Raises:
        InputError: no rotation that is known brings the teacher into the student's basis; or the
            file is missing or changed.

    Cost: reads the teacher's files once when the student is rotated.
    """
    asking = {}
    if square_head_weight:
        asking[f"distill.square_head_weight={square_head_weight:g}"] = (
            "distill.square_head_weight=0"
        )
    if moving_start == "dense":
        asking["distill.moving_start=dense"] = "distill.moving_start=given"
    if not asking or read_sparsity(student) is None:
        return None  # whoever pruned it elsewhere and names a teacher answers for the two
    ours, theirs = _facts_of(student), _facts_of(teacher)
    if ours == theirs:
        return None
    is_copy = is_tuned and not theirs
    if ours and (is_copy or model_fingerprint(teacher) == ours[_MODEL_KEY]):
        return _checked_file(student, ours)
    source = f"the model with fingerprint {ours[_MODEL_KEY][:12]}" if ours else "one not rotated"
    raise InputError(
        f"model.teacher={teacher}: its hidden states lie in another basis than those of {student} "
        f"(prune.rotation_steps turned one of them), and {' and '.join(asking)} needs one basis; "
        f"the teacher must be {source}, or set {' and '.join(asking.values())}"
    )


def _checked_file(folder: Path, facts: dict[str, str]) -> Path:
    path = folder / ROTATION
    if not path.is_file() or file_sha256(path) != facts[_FILE_KEY]:
        state = "is not the one of its sparsity.json" if path.is_file() else "is missing"
        raise InputError(
            f"{path}: {state}; copy it from the model folder that this one was made from, or prune "
            "again"
        )
    return path
