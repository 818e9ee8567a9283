"""Maths, models and formats of sparse language models; torch, transformers, safetensors alone.

The names below are read from their modules when they are asked for (PEP 562), so that importing
`sparsify`, as the command line does, loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.comm import Comm
    from sparsify.distillation.student import DistillStudent
    from sparsify.evaluation.perplexity import evaluate_rows
    from sparsify.formats.packed24 import load_packed, save_packed
    from sparsify.methods import PruneParams, get_method
    from sparsify.models.load import load_pair, save_model
    from sparsify.pattern import Pattern
    from sparsify.pruning import LayerChoice, Memory, prune_checkpoint, prune_model
    from sparsify.quantization.quantize import quantize_model
    from sparsify.rotation import rotate_model

__all__ = [
    "Comm",
    "DistillStudent",
    "LayerChoice",
    "Memory",
    "Pattern",
    "PruneParams",
    "evaluate_rows",
    "get_method",
    "load_packed",
    "load_pair",
    "prune_checkpoint",
    "prune_model",
    "quantize_model",
    "rotate_model",
    "save_model",
    "save_packed",
]

_MODULES = {
    "Comm": "comm",
    "DistillStudent": "distillation.student",
    "LayerChoice": "pruning",
    "Memory": "pruning",
    "Pattern": "pattern",
    "PruneParams": "methods",
    "evaluate_rows": "evaluation.perplexity",
    "get_method": "methods",
    "load_packed": "formats.packed24",
    "load_pair": "models.load",
    "prune_checkpoint": "pruning",
    "prune_model": "pruning",
    "quantize_model": "quantization.quantize",
    "rotate_model": "rotation",
    "save_model": "models.load",
    "save_packed": "formats.packed24",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
