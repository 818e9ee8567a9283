"""Memory beside the hidden states for what saves work if it is kept, and what is too large for it.

Two things are: what the model gives its blocks for a batch (masks, rotary angles), which is made
once in place of for every call, and forwards that wait while layers are solved, which otherwise
begin anew for every group of layers. Batches for which there is no room do the work again: no bit
of the results depends on it. Shape suffixes: B rows of a batch, T tokens of a row, D hidden size.
"""

from __future__ import annotations

import math

from torch import Tensor

from sparsify.calibration.hidden_states import HiddenStateStore, Memory

_THREAD_BYTES = 2**25  # of cuBLAS, for every thread that multiplies on a GPU


class Room:
    """The memory of a walk that is left for this, given away until it is gone.

    Args:
        memory: says how much there is.
        store: of the walk's hidden states.
    """

    def __init__(self, memory: Memory, store: HiddenStateStore) -> None:
        left = memory.spare_bytes
        if left is None:
            left = math.inf if store.is_on_device else 0.0
        self._left = left

    def take(self, num_bytes: int) -> bool:
        """Whether there is room for so many bytes; if so, they are taken."""
        if num_bytes > self._left:
            return False
        self._left -= num_bytes
        return True


def forward_bytes(hidden_BTD: Tensor, widest: int, num_models: int, store: HiddenStateStore) -> int:
    """Memory of a batch's paused forwards, less what the model gave the block.

    Each has the residual stream and its norm, and the widest activation; and what it began with,
    unless that waits there anyway. A Llama's forward holds all of it before its last layer; what
    is kept of the dense model is as much.

    Args:
        hidden_BTD: of the batch.
        widest: features of the widest input or output of a layer.
        num_models: 2 with the dense model.
        store: of the hidden states.
    """
    num_states = 2 if store.is_on_device else 3
    per_feature = hidden_BTD.nbytes // hidden_BTD.shape[-1]
    held = num_models * (num_states * hidden_BTD.nbytes + widest * per_feature)
    return held + (_THREAD_BYTES if hidden_BTD.is_cuda else 0)
