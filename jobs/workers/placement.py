"""Where hidden states wait between blocks: as asked for, or where a worker has room for them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cluster.runtime.worker import WorkerContext
from conf.schema import Config
from sparsify.calibration.hidden_states import Placement
from sparsify.calibration.layers import SolverNeeds
from sparsify.models.load import DTYPES, read_config

_ROOM_ON_GPU = 0.4  # of the free memory that hidden states may take; the rest is for the solver

_ROOM_ON_HOST = 0.5


def placement(
    context: WorkerContext, config: Config, model: Path, num_tokens: int, needs: SolverNeeds,
    is_ahead: bool = False,
) -> Placement:  # fmt: skip
    """Where there is room for the hidden states of a walk.

    On the device, where a pass over a block's layers one by one also holds forwards: for them
    a Llama keeps the hidden states twice more and its widest activation. What the dense model
    does ahead takes a model's hidden states once more, with a teacher six times.

    Args:
        context: this worker.
        config: of the run.
        model: folder of the model that is walked.
        num_tokens: of all calibration rows.
        needs: of the walk's solver; `teacher` and `order` count.
        is_ahead: whether the dense model passes the next block meanwhile.
    """
    shape = read_config(model).get_text_config()
    bytes_per_feature = (
        num_tokens / context.world_size
        * DTYPES[config.model.dtype].itemsize * (2 if needs.teacher else 1)
    )  # fmt: skip
    states = bytes_per_feature * shape.hidden_size
    widest = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    held = 2 * states + bytes_per_feature * widest
    if needs.order != "layer":
        held = 0
    if is_ahead:
        held += 3 * states if needs.teacher else states
    workers_here = max(1, context.world_size // config.cluster.num_nodes)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / workers_here
    if context.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if states + held <= _ROOM_ON_GPU * free:
            return "device"
    elif states + held <= _ROOM_ON_HOST * available:
        return "device"
    return "host" if states <= _ROOM_ON_HOST * available else "disk"
