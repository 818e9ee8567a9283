"""Maths, models and formats of sparse language models; torch, transformers, safetensors alone.

The names below are read from their modules when they are asked for (PEP 562), so that importing
`sparsify`, as the command line does, loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `_FACE` says, for type checkers
    from sparsify.comm import Comm as Comm
    from sparsify.distillation.student import DistillStudent as DistillStudent
    from sparsify.evaluation.perplexity import evaluate_rows as evaluate_rows
    from sparsify.formats.kinds.packed import save_packed_folder as save_packed_folder
    from sparsify.methods import PruneParams as PruneParams
    from sparsify.methods import get_method as get_method
    from sparsify.models.load import load_pair as load_pair
    from sparsify.models.save import save_model as save_model
    from sparsify.pattern import Pattern as Pattern
    from sparsify.pruning import LayerChoice as LayerChoice
    from sparsify.pruning import Memory as Memory
    from sparsify.pruning import prune_checkpoint as prune_checkpoint
    from sparsify.pruning import prune_model as prune_model
    from sparsify.quantization.quantize import quantize_model as quantize_model
    from sparsify.rotation import rotate_model as rotate_model

_FACE = {
    "comm": ("Comm",),
    "distillation.student": ("DistillStudent",),
    "evaluation.perplexity": ("evaluate_rows",),
    "formats.kinds.packed": ("save_packed_folder",),
    "methods": ("PruneParams", "get_method"),
    "models.load": ("load_pair",),
    "models.save": ("save_model",),
    "pattern": ("Pattern",),
    "pruning": ("LayerChoice", "Memory", "prune_checkpoint", "prune_model"),
    "quantization.quantize": ("quantize_model",),
    "rotation": ("rotate_model",),
}

_MODULES = {name: module for module, names in _FACE.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
