"""Rotations folded into a model's weights that make it easier to prune."""

from __future__ import annotations

from sparsify.rotation.basis import Rotation, fold_rotation
from sparsify.rotation.rotate import RotationReport, rotate_model
from sparsify.rotation.sites import find_rotation_sites

__all__ = ["Rotation", "RotationReport", "find_rotation_sites", "fold_rotation", "rotate_model"]
