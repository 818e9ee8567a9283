"""Where DeepSpeed's ZeRO keeps masters and moments; the only reader of its private attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from jobs.training.optimizer import base_optimizer
from sparsify.errors import ReplicasDifferError
from sparsify.training.fragments import Checkpoint, Fragment
from sparsify.training.health import checksum

Part = tuple[str, torch.device, int, int]
"""layer, where its values are, and the first of its elements and the one after the last"""

WEIGHTS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")
"""names of the float32 copies of a parameter that make up the training state"""


def _flat_partitions(engine: Any) -> list[torch.Tensor]:
    """The tensors that the base optimizer updates, in the order of its groups."""
    outer = engine.optimizer
    for name in (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # ZeRO-1 in bf16
    ):
        if hasattr(outer, name):
            return list(getattr(outer, name))
    return [p for group in outer.param_groups for p in group["params"]]


def make_moments(engine: Any) -> None:
    """Give AdamW its state before the first step, as its first step would.

    DeepSpeed attaches the moments to the parameters then, so that there is no first step before
    which they cannot be looked at, saved or restored.
    """
    base_optimizer(engine).make_state(_flat_partitions(engine))
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def state_fragments(engine: Any, for_saving: bool) -> list[Fragment]:
    """Views of the training state that this rank holds, every element of it once.

    Args:
        for_saving: where all ranks hold everything (ZeRO-0), take only this rank's share, so that
            together the ranks hold each element exactly once.
    """
    found = []
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for number, (name, param) in enumerate(engine.module.named_parameters()):
        if not param.requires_grad:
            continue
        if for_saving and engine.zero_optimization_stage() == 0 and number % world_size != rank:
            continue
        for copy, values, start in masters(engine, param):
            values = values[: max(0, param_numel(param) - start)]  # without ZeRO's padding
            if values.numel():
                found.append(Fragment(copy, name, start, values))
    return found


def param_numel(param: Any) -> int:
    """Elements of the whole parameter, wherever ZeRO keeps them."""
    return int(getattr(param, "ds_numel", param.numel()))


def num_updates(engine: Any) -> int:
    """Steps that AdamW has made: all but those that were left out."""
    state = base_optimizer(engine).state
    return int(next(iter(state.values()))["step"])


def restore(engine: Any, checkpoint: Checkpoint, num_updates: int) -> None:
    """Put the weights and moments of a checkpoint into the engine; all ranks call it.

    Args:
        checkpoint: of any number of workers and any ZeRO stage.
        num_updates: AdamW's count of steps at the checkpoint.

    Raises:
        CorruptCheckpointError: it holds another model.
    """
    with torch.no_grad():
        checkpoint.fill(state_fragments(engine, for_saving=False))
        base_optimizer(engine).set_num_updates(num_updates)
        refresh_weights(engine)


def refresh_weights(engine: Any) -> None:
    """Make the weights that compute follow the float32 masters, on every rank."""
    outer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        outer._partition_all_parameters()
        for number in range(len(outer.fp32_partitioned_groups_flat)):
            outer._reassign_or_swap_out_partitioned_parameters(number)
        outer._post_step(set())
    elif stage:
        outer.update_lp_params()


def masters(engine: Any, param: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(copy, flat float32 view, offset of its first element) of what the optimizer updates."""
    outer = engine.optimizer
    if hasattr(param, "ds_tensor"):
        for copy in (WEIGHTS, *MOMENTS):
            key = None if copy == WEIGHTS else copy
            values, _ = outer._get_fp32_opt_state_partition(param, True, key)
            yield copy, values.view(-1), slice_start(param)
    elif hasattr(param, "_hp_mapping"):  # ZeRO-1 and 2: a slice, or nothing, of each parameter
        mapping = param._hp_mapping
        if mapping is not None:
            start, names = mapping.lp_fragment_address.start, base_optimizer(engine).moment_names
            yield WEIGHTS, mapping.get_hp_fragment().view(-1), start
            for key in MOMENTS:
                yield key, mapping.get_hp_fragment(optim_state_key=names[key]).view(-1), start
    else:  # no ZeRO, in fp32: the weights are their own masters
        yield WEIGHTS, param.data.view(-1), 0
        for key in MOMENTS:
            yield key, outer.state[param][outer.moment_names[key]].view(-1), 0


def gradients(engine: Any, params: Iterable[Any]) -> Iterator[tuple[Any, torch.Tensor, int]]:
    """(parameter, flat view of its gradient on this rank, offset of its first element).

    Once the backward passes of a step are done, before the engine's step; what is written to the
    views is what the norm, clipping and AdamW see. ZeRO-2 and 3 have this rank's part of the sum
    over all workers there, without ZeRO every rank has all of it. Not for ZeRO-1, which sums in the
    step, nor for an optimizer in host memory, which is given gradients one by one.
    """
    outer = engine.optimizer
    parts: dict[int, torch.Tensor] = {}
    if engine.zero_optimization_stage() == 3:
        for number, group in enumerate(outer.fp16_groups):
            held = outer.averaged_gradients[number]
            parts.update((id(param), part) for param, part in zip(group, held, strict=True))
    for param in params:
        if hasattr(param, "ds_tensor"):
            yield param, parts[id(param)].view(-1), slice_start(param)
        elif hasattr(param, "_hp_mapping"):
            mapping = param._hp_mapping
            if mapping is not None:  # else no element of it is this rank's
                part = mapping.get_lp_grad_fragment(param._index_in_param_group)
                yield param, part.view(-1), mapping.lp_fragment_address.start
        elif param.grad is not None:
            yield param, param.grad.view(-1), 0


def slice_start(param: Any) -> int:
    return int(param.ds_tensor.ds_numel) * dist.get_rank(param.ds_process_group)


def check_replicas(engine: Any, step: int) -> None:
    """Compare the weights that every worker holds a copy of, which are none under ZeRO-3.

    Raises:
        ReplicasDifferError: a worker's copy is another one.
    """
    if engine.zero_optimization_stage() == 3 or dist.get_world_size() == 1:
        return
    sums: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sums, checksum(param.data for param in engine.module.parameters()))
    odd = [rank for rank, value in enumerate(sums) if value != sums[0]]
    if odd:
        raise ReplicasDifferError(
            f"distill: after step {step} the weights of workers {odd} are not those of worker 0; a "
            "machine computes wrongly: look at it, then run the same command again, which "
            "continues from the last checkpoint"
        )
