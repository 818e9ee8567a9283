"""What all training of sparse models can be told: steps, losses, memory, checkpoints.

The rules are those of `conf.options.distill`, which every kind of training is brought to.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.params import LossWeights, option


@dataclass
class TrainingConfig:
    """Training with the zeros held."""

    batch_size: int = option(16, low=1)
    """rows per optimizer step over all workers"""
    micro_batch_size: int = option(8, low=1, speed_only=True)
    """rows per worker per forward; batch_size is a multiple of this times the workers"""
    learning_rate: float = option(1e-3, above=0)
    """peak learning rate, after warm-up"""
    min_learning_rate_share: float = option(0.05, low=0, high=1)
    """learning rate at the end as a share of the peak; 0 to 1"""
    num_warmup_steps: int = option(10, low=0)
    """steps of linear warm-up"""
    weight_decay: float = option(0.0, low=0)
    """decoupled weight decay of matrices"""
    beta1: float = option(0.9, low=0, below=1)
    """AdamW decay of the gradient's mean; 0 up to but not 1"""
    beta2: float = option(0.95, low=0, below=1)
    """AdamW decay of the gradient's square; 0 up to but not 1"""
    max_grad_norm: float = option(1.0, above=0)
    """gradient norm above which a step is scaled down"""
    kl_weight: float = option(LossWeights.kl, low=0)
    """weight of KL(teacher || student) on the logits"""
    reverse_kl_weight: float = option(LossWeights.reverse_kl, low=0)
    """weight of KL(student || teacher) on the logits"""
    ce_weight: float = option(LossWeights.ce, low=0)
    """weight of cross-entropy with the next token"""
    square_head_weight: float = option(LossWeights.square_head, low=0)
    """weight of the normalised error of the hidden states"""
    temperature: float = option(LossWeights.temperature, above=0)
    """softmax temperature of the KL terms"""
    schedule: list[str] = option([])
    """weights, or the temperature, that change: NAME:END@SHARE goes in a straight line to END over
    that share of the run, such as [square_head_weight:0@0.1]; [] for none"""
    precision: str = option("fp32", one_of=("fp32", "bf16"))
    """arithmetic of training: fp32 or bf16 (with fp32 master weights)"""
    zero_stage: int = option(2, low=0, high=3, speed_only=True)
    """DeepSpeed ZeRO stage, 0 to 3: what is split over the workers"""
    zero_hpz_size: int = option(1, low=1, speed_only=True)
    """ZeRO-3 on several nodes: GPUs of a node that share a second copy of the weights; 1 = none"""
    offload_optimizer: bool = option(False, speed_only=True)
    """ZeRO: masters and moments in host memory, updated by the CPU: less GPU memory, slower"""
    compile: bool = option(False, speed_only=True)
    """torch.compile every decoder layer of student and teacher: faster, a few minutes to start"""
    recompute_share: float = option(0.0, low=0, high=1, speed_only=True)
    """share of the decoder layers recomputed in the backward pass: less memory, slower; 0 to 1"""
    recompute: str = option("whole", one_of=("whole", "elementwise"), speed_only=True)
    """of the layers recomputed: all (whole), or what lies between products of matrices and
    attention (elementwise): frees a third as much, and takes hardly any time"""
    attention: str = option("auto", one_of=("auto", "varlen", "masked"), speed_only=True)
    """over rows of several documents: varlen (within each document), masked (over the whole row) or
    auto: varlen for a model that is found to compute the same with it, else masked"""
    teacher_placement: str = option(
        "replicated", one_of=("replicated", "node", "sharded"), speed_only=True
    )
    """the teacher, where one is loaded, on every worker (replicated), split over a node's (node) or
    over all (sharded)"""
    teacher_dtype: str | None = option(None, one_of=("float32", "bfloat16", "float8"))
    """type of the teacher's weights: float32, bfloat16 or float8; null = as precision"""
    checkpoint_every_steps: int | None = option(50, low=1, speed_only=True)
    """steps between two checkpoints; null = by Young's formula from the measured stall"""
    mtbf_hours: float = option(24.0, above=0, speed_only=True)
    """hours between two failures that Young's formula expects, preemption included"""
    keep_checkpoints: int = option(2, low=1, speed_only=True)
    """newest checkpoints that are kept"""
    milestone_every_steps: int | None = option(None, low=1, speed_only=True)
    """keep the checkpoints at multiples of this too; null = none"""
    heldout_every_steps: int | None = option(None, low=1, speed_only=True)
    """steps between two scores on held-out text, each source of a mix by itself; null = never"""
    heldout_tokens: int = option(16_384, low=1, speed_only=True)
    """held-out tokens per source and score, at most"""
    time_limit_hours: float | None = option(None, above=0, speed_only=True)
    """hours from its first start after which the stage stops with a checkpoint; null = never"""
    on_time_limit: str = option("stop", one_of=("stop", "finish"))
    """then: stop, to resume later, or finish: the stage ends with the weights of that step, its
    learning rate not yet down, and later stages go on from them"""
    time_reserve_s: float = option(60.0, low=0, speed_only=True)
    """seconds before that limit in which no step is started any more"""
    hang_after_s: float = option(120.0, above=0, speed_only=True)
    """least seconds without a step after which a worker counts as hung and is restarted"""
    pause_limit_s: float = option(3600.0, above=0, speed_only=True)
    """seconds without an end after which a save, a rollback or a held-out score counts as hung"""
    checksum_every_steps: int | None = option(100, low=1, speed_only=True)
    """steps between two comparisons of the workers' copies of the weights; null = never"""
    on_bad_step: str = option("rollback", one_of=("skip", "rollback", "stop"))
    """a step with a loss spike or a non-finite gradient is left out; then: skip, rollback, stop"""
    max_bad_steps: int = option(3, low=0)
    """bad steps in a row that are only left out, before the run goes back or stops"""
