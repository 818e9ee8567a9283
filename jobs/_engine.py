"""The trainer: the only importer of DeepSpeed.

Owns the DeepSpeed configuration (every default that matters written out, none taken on trust), the
guard that keeps pruned weights exactly zero in every copy ZeRO makes of them, and checkpoints that
are whole or absent. Knows nothing of losses, data or schedules: jobs/distill.py does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from conf.stages import DistillConfig
from sparsify.errors import InputError, PatternViolationError
from sparsify.files import fsync

_MOMENTS = ("exp_avg", "exp_avg_sq")
_TAG = "state"
_NEVER = 10**9


def deepspeed_config(config: DistillConfig, world_size: int, uses_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for a recovery.

    DeepSpeed ignores names it does not know and changes defaults between releases, so whatever
    decides numbers is written here.
    """
    bucket_elements = 200_000_000
    accumulation = config.batch_size // (config.micro_batch_size * world_size)
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.max_grad_norm,
        "prescale_gradients": False,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        "fp16": {"enabled": False},
        # A step with a non-finite gradient is skipped and counted; the loop stops on the count.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": False,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": uses_gpu,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket_elements,
            "allgather_partitions": True,
            "allgather_bucket_size": bucket_elements,
            "round_robin_gradients": False,
            "load_from_fp32_weights": True,
            "elastic_checkpoint": False,
            "stage3_prefetch_bucket_size": bucket_elements // 4,
            "stage3_param_persistence_threshold": 100_000,
        },
    }


def build_engine(model: nn.Module, config: DistillConfig, world_size: int, uses_gpu: bool) -> Any:
    """Wrap `model` in a DeepSpeed engine with AdamW.

    Over gloo DeepSpeed would compile a shared-memory kernel at first use. It is switched off: it
    needs a compiler on every node, and a killed run leaves its segments behind in /dev/shm.
    """
    if not uses_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU that it finds
    import deepspeed

    if not uses_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if uses_gpu else "gloo", verbose=False)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, world_size, uses_gpu)
    )
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the rate of every parameter group for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


class MaskGuard:
    """Holds pruned weights at zero in the weights, the fp32 masters and both Adam moments.

    Gradients are masked by hooks (`sparsify.masks.mask_gradients`), so nothing here should ever
    find work: AdamW leaves a weight with zero gradient and zero moments at exactly zero. The guard
    proves it after every step, on the parts of the copies that this rank holds.
    """

    def __init__(self, engine: Any, masks: dict[str, torch.Tensor]) -> None:
        self._engine = engine
        named = dict(engine.module.named_parameters())
        self._layers = {name: (named[f"{name}.weight"], mask) for name, mask in masks.items()}

    def check(self, with_moments: bool = True) -> None:
        """Look at every copy.

        Args:
            with_moments: False where no step has been made yet in this process: DeepSpeed attaches
                the moments, also those of a checkpoint, at the first one.

        Raises:
            PatternViolationError: a pruned element is not zero; names layer and copy.
        """
        for layer, copy, values, pruned in self._copies(with_moments):
            # Multiplying by 0 would hide NaN; counting does not.
            num_alive = int(torch.count_nonzero(values[pruned]))
            if num_alive:
                raise PatternViolationError(
                    f"distill: {num_alive} pruned elements of {layer} are not zero in the {copy}; "
                    "the mask was not held and the step cannot be trusted"
                )

    def clear(self) -> None:
        """Zero the pruned elements of every copy: once, before the first step."""
        with torch.no_grad():
            for _, _, values, pruned in self._copies(with_moments=False):
                values.masked_fill_(pruned, 0.0)

    def _copies(self, with_moments: bool) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
        """(layer, copy name, flat values on this rank, flat bool True where pruned).

        DeepSpeed makes the moments at the first step, so before it there are none to look at.
        """
        moments = _MOMENTS if with_moments else ()
        for layer, (param, mask) in self._layers.items():
            pruned = ~mask.flatten().to(param.device)
            for copy, values, start in _local_copies(self._engine, param, moments):
                part = pruned[start : start + values.numel()]
                yield layer, copy, values[: part.numel()], part


def _local_copies(
    engine: Any, param: Any, moments: tuple[str, ...]
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(copy, flat view, offset of its first element in the parameter) held by this rank."""
    optimizer = engine.optimizer
    if not hasattr(param, "ds_tensor"):
        yield "weights", param.data.view(-1), 0
    if hasattr(param, "ds_tensor"):  # ZeRO-3: every rank holds one slice of every parameter
        start = param.ds_tensor.ds_numel * dist.get_rank(param.ds_process_group)
        yield "weights", param.ds_tensor.data.view(-1), start
        yield "fp32 master", optimizer.get_local_fp32_param(param).view(-1), start
        for key in moments:
            yield key, optimizer.get_local_fp32_param(param, key).view(-1), start
    elif hasattr(param, "_hp_mapping"):  # ZeRO-1 and 2: a slice, or nothing, of each parameter
        mapping = param._hp_mapping
        if mapping is not None:
            start = mapping.lp_fragment_address.start
            yield "fp32 master", mapping.get_hp_fragment().view(-1), start
            for key in moments:
                yield key, mapping.get_hp_fragment(optim_state_key=key).view(-1), start
    else:  # ZeRO-0 in fp32: the weights are their own masters
        for key in moments:
            yield key, optimizer.state[param][key].view(-1), 0


def save_checkpoint(engine: Any, folder: Path, step: int, client_state: dict[str, Any]) -> None:
    """Write the state after `step` steps under `folder`; all ranks call it.

    The files go to a temporary name; rank 0 renames it when every rank has written and flushed
    its part, then removes older checkpoints. A kill at any moment leaves the previous one whole.
    """
    partial = folder / f".step-{step:08d}.tmp"
    if dist.get_rank() == 0 and partial.exists():
        shutil.rmtree(partial)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=_TAG, client_state=client_state, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        for path in sorted(partial.rglob("*")):
            fsync(path)
        partial.rename(folder / f"step-{step:08d}")
        fsync(folder)
        for old in finished_checkpoints(folder)[:-1]:
            shutil.rmtree(folder / f"step-{old:08d}")
    dist.barrier()


def finished_checkpoints(folder: Path) -> list[int]:
    """Steps of the whole checkpoints under `folder`, in order."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def latest_checkpoint(folder: Path) -> int | None:
    """Step of the last whole checkpoint as rank 0 sees it, on all ranks; all ranks call it.

    A network file system may show the folder's newest entries to one node later than to another.
    """
    steps = finished_checkpoints(folder)
    latest: list[int | None] = [steps[-1] if steps else None]
    dist.broadcast_object_list(latest, src=0)
    return latest[0]


def load_checkpoint(engine: Any, folder: Path, step: int, world_size: int) -> dict[str, Any]:
    """Load the checkpoint of `step` into the engine; returns the client state.

    Raises:
        InputError: it was written by another number of workers.
    """
    path = folder / f"step-{step:08d}"
    parts = len(list((path / _TAG).glob("*optim_states.pt")))
    if parts not in (0, world_size):
        raise InputError(
            f"{path}: written by {parts} workers, this run has {world_size}; go on with "
            f"cluster.num_workers={parts}, or start over with run.redo=[distill]"
        )
    _, client_state = engine.load_checkpoint(str(path), tag=_TAG)
    return dict(client_state)


def gathered_state_dict(engine: Any) -> dict[str, torch.Tensor] | None:
    """The whole model's weights on rank 0, None elsewhere; all ranks call it.

    Under ZeRO-3 one parameter at a time is gathered, so no rank but the first holds the model.
    """
    import deepspeed

    is_first = dist.get_rank() == 0
    if engine.zero_optimization_stage() < 3:
        return engine.module.state_dict() if is_first else None
    state: dict[str, torch.Tensor] = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            if is_first:
                state[name] = param.detach().cpu().clone()
    if is_first:
        kept = engine.module.state_dict().keys()
        state.update((name, b) for name, b in engine.module.named_buffers() if name in kept)
    return state if is_first else None
