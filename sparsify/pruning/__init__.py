"""A checkpoint to a pruned one, block by block, resumable."""

from __future__ import annotations

from sparsify.calibration.hidden_states import Memory
from sparsify.pruning.budget import allocate
from sparsify.pruning.progress import LayerReport
from sparsify.pruning.prune import LayerChoice, prune_checkpoint, prune_model

__all__ = [
    "LayerChoice", "LayerReport", "Memory", "allocate", "prune_checkpoint", "prune_model",
]  # fmt: skip
