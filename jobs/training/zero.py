"""DeepSpeed's configuration of a recovery, every default that matters written out.

DeepSpeed ignores names it does not know and changes defaults between releases, so whatever decides
numbers, memory or traffic is said here, and `jobs.training.engine` holds every name against the
schema of the installed version before it is used.
"""

from __future__ import annotations

from typing import Any

from conf.options.distill import DistillConfig

_NEVER = 10**9

BUCKET_ELEMENTS = 200_000_000
"""gradients that are summed over the workers at a time"""

_PERSISTENT_ELEMENTS = 100_000  # ZeRO-3 does not shard smaller parameters: norms, biases

_UNBOUNDED = 10**15

TOP_LEVEL = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "prescale_gradients", "gradient_predivide_factor", "steps_per_print",
    "wall_clock_breakdown", "dump_state", "communication_data_type", "fp16", "bf16", "data_types",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
})  # fmt: skip
"""names at the top of the configuration that DeepSpeed reads and this project sets"""


def deepspeed_config(config: DistillConfig, world_size: int, uses_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for a recovery by `world_size` workers."""
    accumulation = config.batch_size // (config.micro_batch_size * world_size)
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # Without ZeRO the optimizer clips: DeepSpeed neither reports the norm there nor skips a
        # step whose norm is not finite.
        "gradient_clipping": config.max_grad_norm if config.zero_stage else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        "dump_state": False,
        "fp16": {"enabled": False},
        # A step with a non-finite gradient is left out, in every stage; the loop counts it.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        # What gradients are in while they are summed over workers: of 32, a sum in bfloat16 is off
        # by 0.7 % of the gradient, in float32 by 0.2 %, for twice the bytes in every micro batch (a
        # ring of bfloat16 gradients, simulated).
        "communication_data_type": config.precision,
        # AdamW of torch, with a gate in front: as elementwise as the ones DeepSpeed has tried.
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on the CPU too; DeepSpeed's own needs a compiler on every node.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(config, uses_gpu),
    }


def masks_at_step(config: DistillConfig) -> bool:
    """Whether gradients are masked once a step, on the part that a worker keeps of their sum.

    Otherwise hooks do it in every backward pass: in ZeRO-1, which sums in the step and then takes
    the norm, and with the optimizer in host memory, where norms are taken as gradients arrive.
    """
    return config.zero_stage != 1 and not config.offload_optimizer


def _zero(config: DistillConfig, uses_gpu: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": uses_gpu,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "use_multi_rank_bucket_allreduce": True,
        "allgather_partitions": True,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "round_robin_gradients": False,
        "compute_grad_norm": True,
        "ignore_unused_parameters": True,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
        "legacy_stage1": False,
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": BUCKET_ELEMENTS // 4,
        "stage3_param_persistence_threshold": _PERSISTENT_ELEMENTS,
        "stage3_model_persistence_threshold": _UNBOUNDED,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
        "memory_efficient_linear": False,
        "zero_hpz_partition_size": config.zero_hpz_size,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": uses_gpu}
    return zero
