"""The trainer: the only importer of DeepSpeed.

Builds the engine, holds pruned weights exactly zero in every copy that ZeRO makes of them, and
reads and writes the whole training state as fragments (`sparsify.training.fragments`), the same
for every ZeRO stage and number of workers. Knows nothing of losses, data or schedules: the loop
does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from conf.options.distill import DistillConfig
from jobs.training.optimizer import Gated, GatedAdamW, is_matrix
from jobs.training.zero import TOP_LEVEL, deepspeed_config
from jobs.training.zero_state import make_moments
from sparsify.errors import InputError
from sparsify.training.moving_masks import Gathered


def check_names(config: dict[str, Any]) -> None:
    """Hold every name of `config` against what the installed DeepSpeed knows.

    Raises:
        InputError: names a setting that DeepSpeed would have ignored.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # costs seconds

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    unknown = (set(config) - TOP_LEVEL) | (set(config["zero_optimization"]) - known)
    if unknown:
        raise InputError(
            f"DeepSpeed does not know {', '.join(sorted(unknown))} and would ignore it; this "
            "version of twofour was made for the DeepSpeed in constraints.txt"
        )


def _started(uses_gpu: bool) -> Any:
    """DeepSpeed, with its process group.

    Over gloo it would compile a shared-memory kernel at first use. That is switched off: it needs
    a compiler on every node, and a killed run leaves its segments behind in /dev/shm.
    """
    if not uses_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU that it finds
    import deepspeed  # costs seconds, and reads the environment

    deepspeed.utils.logger.addFilter(_is_no_word_of_the_optimizer)
    if not uses_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if uses_gpu else "gloo", verbose=False)
    return deepspeed


def _is_no_word_of_the_optimizer(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of optimizers that it does not know; the laws of each step test this one."""
    return "untested optimizer" not in record.getMessage()


class Partitioner:
    """Splits a student's blocks over the workers one after another, before the engine is built.

    Under ZeRO-3 no worker then ever holds more of the student than the block in hand; what is
    outside the blocks is split by `build_engine`. In the other stages, which need the weights
    whole, nothing is done. All workers call it for the same blocks in the same order.

    Args:
        config, world_size, uses_gpu: as for `build_engine`.
    """

    def __init__(self, config: DistillConfig, world_size: int, uses_gpu: bool) -> None:
        self.is_needed = config.zero_stage == 3
        self._config, self._world_size, self._uses_gpu = config, world_size, uses_gpu
        self._split: Any = None  # a parameter that is split; it knows how to split others

    def __call__(self, block: nn.Module) -> None:
        """Leave this worker its slice of every parameter of `block`, those of the first worker."""
        if not self.is_needed:
            return
        if self._split is not None:
            self._split.convert_to_zero_parameters(param_list=list(block.parameters()))
            return
        settings = deepspeed_config(self._config, self._world_size, self._uses_gpu)
        check_names(settings)
        self._split = next(block.parameters())
        zero = _started(self._uses_gpu).zero
        zero.Init(module=block, config_dict_or_path=settings, dtype=self._split.dtype)


def build_engine(
    model: nn.Module, config: DistillConfig, world_size: int, uses_gpu: bool,
    make_optimizer: Callable[..., Gated] | None = None,
) -> Any:  # fmt: skip
    """Wrap `model` in a DeepSpeed engine with AdamW, its moments made and zero.

    Args:
        model: what is trained, of which some parameters may be frozen.
        config: options of the engine.
        world_size: number of workers.
        uses_gpu: whether they have GPUs.
        make_optimizer: of groups of parameters, `lr`, `betas` and `eps`; None: torch's AdamW.
    """
    deepspeed = _started(uses_gpu)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if is_matrix(p)]
    others = [p for p in trained if not is_matrix(p)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    betas = config.beta1, config.beta2
    make_optimizer = make_optimizer or partial(GatedAdamW, fused=True)
    optimizer = make_optimizer(groups, lr=config.learning_rate, betas=betas, eps=1e-8)
    if config.zero_stage == 0:
        optimizer.max_grad_norm = config.max_grad_norm
    settings = deepspeed_config(config, world_size, uses_gpu)
    if config.zero_stage in (1, 2):  # which fill a buffer of that size, however little is trained
        zero, num_trained = settings["zero_optimization"], sum(p.numel() for p in trained)
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], num_trained)
    check_names(settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    make_moments(engine)
    return engine


def gathered(engine: Any) -> Gathered:
    """What makes a parameter whole on every rank while its context lasts; all ranks enter it."""
    if engine.zero_optimization_stage() < 3:
        return lambda param: nullcontext()
    import deepspeed  # costs seconds, and reads the environment

    return lambda param: deepspeed.zero.GatheredParameters([param])


def gathered_state_dict(engine: Any) -> dict[str, torch.Tensor] | None:
    """The whole model's weights on rank 0, None elsewhere; all ranks call it.

    Under ZeRO-3 one parameter at a time is gathered, so no rank but the first holds the model.
    """
    is_first = dist.get_rank() == 0
    if engine.zero_optimization_stage() < 3:
        return engine.module.state_dict() if is_first else None
    state: dict[str, torch.Tensor] = {}
    whole = gathered(engine)
    for name, param in engine.module.named_parameters():
        with whole(param):
            if is_first:
                state[name] = param.detach().cpu().clone()
    if is_first:
        kept = engine.module.state_dict().keys()
        state.update((name, b) for name, b in engine.module.named_buffers() if name in kept)
    return state if is_first else None
