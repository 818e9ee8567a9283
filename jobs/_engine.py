"""The trainer: the only importer of DeepSpeed.

Builds the engine, holds pruned weights exactly zero in every copy that ZeRO makes of them, and
reads and writes the whole training state as fragments (`sparsify.fragments`), the same for every
ZeRO stage and number of workers. Knows nothing of losses, data or schedules: the loop does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from conf.stages import DistillConfig
from jobs._zero import TOP_LEVEL, deepspeed_config
from sparsify.errors import InputError, PatternViolationError
from sparsify.fragments import Checkpoint, Fragment
from sparsify.masking import has_alive
from sparsify.masks import PackedMasks, unpack_mask

_Part = tuple[str, torch.device, int, int]
"""layer, where its values are, and the first and the behind-last of its elements"""
WEIGHTS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")
"""names of the float32 copies of a parameter that make up the training state"""


class GatedAdamW(torch.optim.AdamW):
    """AdamW that asks before an update: if it may not, weights and moments stay as they are.

    The engine's step runs as usual either way and clears the gradients. Without ZeRO it also clips,
    and leaves out a step whose gradient norm is not finite; DeepSpeed does both in its other
    stages.
    """

    may_update: Callable[[], bool] | None = None
    """asked once per step of the engine, when the gradient's norm is known"""
    answer: bool | None = None
    """to the question, in this step of the engine"""
    max_grad_norm: float | None = None
    grad_norm: float | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, or none; DeepSpeed calls it once per group of parameters."""
        if self.max_grad_norm is not None:
            params = [p for group in self.param_groups for p in group["params"]]
            self.grad_norm = float(nn.utils.clip_grad_norm_(params, self.max_grad_norm))
            if not self.grad_norm < float("inf"):
                return None
        if self.answer is None:
            self.answer = True if self.may_update is None else self.may_update()
        return super().step(closure) if self.answer else None


def check_names(config: dict[str, Any]) -> None:
    """Hold every name of `config` against what the installed DeepSpeed knows.

    Raises:
        InputError: names a setting that DeepSpeed would have ignored.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

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
    import deepspeed

    if not uses_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if uses_gpu else "gloo", verbose=False)
    return deepspeed


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


def build_engine(model: nn.Module, config: DistillConfig, world_size: int, uses_gpu: bool) -> Any:
    """Wrap `model` in a DeepSpeed engine with AdamW, its moments made and zero."""
    deepspeed = _started(uses_gpu)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if _is_matrix(p)]
    others = [p for p in trained if not _is_matrix(p)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    optimizer = GatedAdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8,
        fused=True,
    )  # fmt: skip
    if config.zero_stage == 0:
        optimizer.max_grad_norm = config.max_grad_norm
    settings = deepspeed_config(config, world_size, uses_gpu)
    check_names(settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    _make_moments(engine)
    return engine


def _is_matrix(param: Any) -> bool:
    """Of the whole parameter: what ZeRO-3 leaves of it in place has no shape."""
    return len(getattr(param, "ds_shape", param.shape)) >= 2


def base_optimizer(engine: Any) -> GatedAdamW:
    """The AdamW inside whatever ZeRO wrapped around it."""
    outer = engine.optimizer
    return outer if isinstance(outer, GatedAdamW) else outer.optimizer


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the rate of every parameter group for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def step_if(engine: Any, may_update: Callable[[], bool]) -> None:
    """The engine's step at the end of a batch, with its update only if `may_update` says so.

    `may_update` is asked on every rank when the gradient's norm is known (`grad_norm`), and must
    answer alike on all; it is not asked where the norm is not finite: then there is no update.
    """
    optimizer = base_optimizer(engine)
    optimizer.may_update, optimizer.answer = may_update, None
    try:
        engine.step()
    finally:
        optimizer.may_update = None


def grad_norm(engine: Any) -> float:
    """Global norm of the step's gradient, before clipping; NaN where it is not finite."""
    outer = engine.optimizer
    norm = outer.grad_norm if isinstance(outer, GatedAdamW) else outer._global_grad_norm
    # DeepSpeed says -1 or infinity of a norm that is not finite.
    return float(norm) if norm is not None and 0 <= float(norm) < float("inf") else float("nan")


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


def _make_moments(engine: Any) -> None:
    """Give AdamW its state before the first step, as its first step would.

    DeepSpeed attaches the moments to the parameters then, so that there is no first step before
    which they cannot be looked at, saved or restored.
    """
    state = base_optimizer(engine).state
    for flat in _flat_partitions(engine):
        step = torch.zeros((), device=flat.device if flat.is_cuda else "cpu")
        state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
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
        for copy, values, start in _masters(engine, param):
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
        for entry in base_optimizer(engine).state.values():
            entry["step"].fill_(num_updates)
        settle(engine)


def settle(engine: Any) -> None:
    """Make the weights that compute follow the float32 masters, on every rank."""
    outer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        outer._partition_all_parameters()
        for number in range(len(outer.fp32_partitioned_groups_flat)):
            outer._reassign_or_swap_out_partitioned_parameters(number)
        outer._post_step(set())
    elif stage:
        outer.update_lp_params()


class MaskGuard:
    """Holds pruned weights at zero in the weights, the fp32 masters and both Adam moments.

    Gradients are masked by hooks (`sparsify.masking.mask_gradients`), so nothing here should ever
    find work: AdamW leaves a weight with zero gradient and zero moments at exactly zero. The guard
    proves it after every step, on the parts of the copies that this rank holds. It keeps the bits
    of those parts beside them, and unpacks one at a time.
    """

    def __init__(self, engine: Any, masks: PackedMasks) -> None:
        self._engine = engine
        named = dict(engine.module.named_parameters())
        self._weights = {name: named[f"{name}.weight"] for name in masks}
        self._packed: dict[str, torch.Tensor] = {}
        self._parts: dict[_Part, torch.Tensor] = {}
        self.set_masks(masks)

    def set_masks(self, masks: PackedMasks) -> None:
        """Hold other masks of the same layers from here on."""
        self._packed, self._parts = masks.packed, {}

    def check(self) -> None:
        """Look at every copy.

        Raises:
            PatternViolationError: a pruned element is not zero; names layer and copy.
        """
        # Multiplying by 0 would hide NaN; this does not.
        if not has_alive((values, pruned) for _, _, values, pruned in self._copies()):
            return
        for layer, copy, values, pruned in self._copies():
            num_alive = int(torch.count_nonzero(values[pruned]))
            if num_alive:
                raise PatternViolationError(
                    f"distill: {num_alive} pruned elements of {layer} are not zero in the {copy}; "
                    "the mask was not held and the step cannot be trusted"
                )

    def clear(self) -> None:
        """Zero the pruned elements of every copy: once, before the first step."""
        with torch.no_grad():
            for _, _, values, pruned in self._copies():
                values.masked_fill_(pruned, 0.0)

    def _copies(self) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
        """(layer, copy name, flat values on this rank, flat bool True where pruned)."""
        for layer, param in self._weights.items():
            numel = param_numel(param)
            found: dict[_Part, torch.Tensor] = {}
            for copy, values, start in _local_copies(self._engine, param):
                # Only the bits of this rank's slice, once for all copies of it.
                part = (layer, values.device, start, min(start + values.numel(), numel))
                if part not in found:
                    found[part] = _pruned(self._bits(part), *part[2:])
                yield layer, copy, values[: len(found[part])], found[part]

    def _bits(self, part: _Part) -> torch.Tensor:
        """The bytes of a layer's mask that hold a part of it."""
        layer, device, start, stop = part
        if part not in self._parts:
            self._parts[part] = self._packed[layer][start // 8 : -(-stop // 8)].to(device)
        return self._parts[part]


def _pruned(bits: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Flat bool: the elements of a mask from `start` to `stop` that are pruned.

    Args:
        bits: packed, from the byte on that holds element `start`.
        start, stop: elements of the mask.
    """
    first = start // 8 * 8
    keep = unpack_mask(bits, (max(0, min(8 * len(bits), stop - first)),))
    return ~keep[start - first :]


def _local_copies(engine: Any, param: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(what it is called, flat view, offset of its first element) of all that this rank holds."""
    if hasattr(param, "ds_tensor"):  # ZeRO-3: every rank holds one slice of every parameter
        yield "weights", param.ds_tensor.data.view(-1), _slice_start(param)
    else:
        yield "weights", param.data.view(-1), 0
    for copy, values, start in _masters(engine, param):
        if copy != WEIGHTS:
            yield copy, values, start
        elif values.data_ptr() != param.data.data_ptr():
            yield "fp32 master", values, start


def _masters(engine: Any, param: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(copy, flat float32 view, offset of its first element) of what the optimizer updates."""
    outer = engine.optimizer
    if hasattr(param, "ds_tensor"):
        for copy in (WEIGHTS, *MOMENTS):
            key = None if copy == WEIGHTS else copy
            values, _ = outer._get_fp32_opt_state_partition(param, True, key)
            yield copy, values.view(-1), _slice_start(param)
    elif hasattr(param, "_hp_mapping"):  # ZeRO-1 and 2: a slice, or nothing, of each parameter
        mapping = param._hp_mapping
        if mapping is not None:
            start = mapping.lp_fragment_address.start
            yield WEIGHTS, mapping.get_hp_fragment().view(-1), start
            for key in MOMENTS:
                yield key, mapping.get_hp_fragment(optim_state_key=key).view(-1), start
    else:  # no ZeRO, in fp32: the weights are their own masters
        yield WEIGHTS, param.data.view(-1), 0
        for key in MOMENTS:
            yield key, outer.state[param][key].view(-1), 0


def _slice_start(param: Any) -> int:
    return int(param.ds_tensor.ds_numel) * dist.get_rank(param.ds_process_group)


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
