"""Options distill.*: recovery by distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from conf import checks as rules
from conf.checks import nearest_multiples, not_blank
from sparsify.distillation.schedule import LossSchedule, LossWeights
from sparsify.errors import InputError

if TYPE_CHECKING:
    from sparsify.distillation.schedule import LossSchedule


def batch_fits_workers(distill: DistillConfig, num_workers: int) -> None:
    """Require that a step splits into equal micro-batches on every worker."""
    unit = distill.micro_batch_size * num_workers
    if distill.batch_size % unit:
        raise InputError(
            f"distill.batch_size={distill.batch_size}: must be a multiple of {unit} = "
            f"distill.micro_batch_size={distill.micro_batch_size} x cluster.num_workers="
            f"{num_workers}; use {nearest_multiples(distill.batch_size, unit)}, "
            "or a smaller distill.micro_batch_size"
        )


def cache_fits(distill: DistillConfig, losses: LossSchedule) -> None:
    """Require that a sample of the teacher is all that the recovery asks of the teacher."""
    field = f"distill.teacher_cache={distill.teacher_cache}"
    not_blank("distill.teacher_cache", distill.teacher_cache, optional=True)
    if distill.teacher_cache is None:
        return
    for name, why in (
        ("reverse_kl", "says nothing of tokens that it does not hold"),
        ("square_head", "has no hidden states"),
    ):
        if losses.peak(name):
            raise InputError(
                f"{field}: a sample of the teacher {why}; set distill.{name}_weight=0 and leave it "
                "out of distill.schedule, or leave distill.teacher_cache out"
            )
    if not losses.peak("kl"):
        raise InputError(
            f"{field}: only the KL term reads it, and distill.kl_weight=0; set that weight, or "
            "leave distill.teacher_cache out"
        )
    ramp = losses.ramps.get("temperature")
    if ramp is not None and ramp.end != distill.temperature:
        raise InputError(
            f"{field}: is drawn at one temperature, and distill.schedule moves it from "
            f"{distill.temperature:g} to {ramp.end:g}; leave it out of the schedule, or leave "
            "distill.teacher_cache out"
        )
    if distill.teacher_dtype is not None:
        raise InputError(
            f"distill.teacher_dtype={distill.teacher_dtype} with {field}: no teacher is loaded; "
            "leave one of the two out"
        )


@dataclass
class DistillConfig:
    """Recovery by distillation from the dense model, the zeros held."""

    num_tokens: int = 1_000_000
    """tokens to train on"""
    batch_size: int = 16
    """rows per optimizer step over all workers"""
    micro_batch_size: int = 8
    """rows per worker per forward; batch_size is a multiple of this times the workers"""
    learning_rate: float = 1e-3
    """peak learning rate, after warm-up"""
    min_learning_rate_share: float = 0.05
    """learning rate at the end as a share of the peak; 0 to 1"""
    num_warmup_steps: int = 10
    """steps of linear warm-up"""
    weight_decay: float = 0.0
    """decoupled weight decay of matrices"""
    beta1: float = 0.9
    """AdamW decay of the gradient's mean; 0 up to but not 1"""
    beta2: float = 0.95
    """AdamW decay of the gradient's square; 0 up to but not 1"""
    max_grad_norm: float = 1.0
    """gradient norm above which a step is scaled down"""
    kl_weight: float = 1.0
    """weight of KL(teacher || student) on the logits"""
    reverse_kl_weight: float = 0.0
    """weight of KL(student || teacher) on the logits"""
    ce_weight: float = 0.0
    """weight of cross-entropy with the next token"""
    square_head_weight: float = 0.0
    """weight of the normalised error of the hidden states"""
    temperature: float = 1.0
    """softmax temperature of the KL terms"""
    schedule: list[str] = field(default_factory=list)
    """weights, or the temperature, that change: NAME:END@SHARE goes in a straight line to END over
    that share of the run, such as [square_head_weight:0@0.1]; [] for none"""
    precision: str = "fp32"
    """arithmetic of training: fp32 or bf16 (with fp32 master weights)"""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage, 0 to 3: what is split over the workers"""
    zero_hpz_size: int = 1
    """ZeRO-3 on several nodes: GPUs of a node that share a second copy of the weights; 1 = none"""
    offload_optimizer: bool = False
    """ZeRO: masters and moments in host memory, updated by the CPU: less GPU memory, slower"""
    compile: bool = False
    """torch.compile every decoder layer of student and teacher: faster, a few minutes to start"""
    recompute_share: float = 0.0
    """share of the decoder layers recomputed in the backward pass: less memory, slower; 0 to 1"""
    attention: str = "auto"
    """over rows of several documents: varlen (within each document), masked (over the whole row) or
    auto: varlen for a model that is found to compute the same with it, else masked"""
    teacher_placement: str = "replicated"
    """the teacher on every worker (replicated), split over a node's (node) or over all (sharded);
    with distill.teacher_cache there is none to place"""
    teacher_dtype: str | None = None
    """type of the teacher's weights: float32, bfloat16 or float8; null = as distill.precision"""
    teacher_cache: str | None = None
    """folder of jobs.teach over the rows of data.train: no teacher is loaded; null = the teacher"""
    checkpoint_every_steps: int | None = 50
    """steps between two checkpoints; null = by Young's formula from the measured stall"""
    mtbf_hours: float = 24.0
    """hours between two failures that Young's formula expects, preemption included"""
    keep_checkpoints: int = 2
    """newest checkpoints that are kept"""
    milestone_every_steps: int | None = None
    """keep the checkpoints at multiples of this too; null = none"""
    heldout_every_steps: int | None = None
    """steps between two scores on held-out text, each source of a mix by itself; null = never"""
    heldout_tokens: int = 16_384
    """held-out tokens per source and score, at most"""
    time_limit_hours: float | None = None
    """hours after which the stage stops with a checkpoint, to go on later; null = never"""
    time_reserve_s: float = 60.0
    """seconds before that limit in which no step is begun any more"""
    hang_after_s: float = 120.0
    """least seconds without a step after which a worker counts as hung and is restarted"""
    pause_limit_s: float = 3600.0
    """seconds without an end after which a save, a rollback or a held-out score counts as hung"""
    checksum_every_steps: int | None = 100
    """steps between two comparisons of the workers' copies of the weights; null = never"""
    on_bad_step: str = "rollback"
    """a step with a loss spike or a non-finite gradient is left out; then: skip, rollback, stop"""
    max_bad_steps: int = 3
    """bad steps in a row that are only left out, before the run goes back or stops"""
    moving_share: float = 0.0
    """share of the steps in which masks follow the weights (SR-STE); 0 = they never move"""
    moving_start: str = "given"
    """weights to begin with where masks move: those of run.from (given, which may be dense), or the
    dense model's behind the masks of run.from (dense)"""
    mask_refresh_steps: int = 10
    """steps between two choices of the masks while they move"""
    mask_decay: float = 2e-4
    """weight of pruned weights in their own gradient while masks move"""

    def __post_init__(self) -> None:
        for name in (
            "num_tokens", "batch_size", "micro_batch_size", "zero_hpz_size", "keep_checkpoints",
            "mask_refresh_steps", "heldout_tokens",
        ):  # fmt: skip
            rules.in_range(f"distill.{name}", getattr(self, name), low=1)
        for name in (
            "checkpoint_every_steps", "milestone_every_steps", "checksum_every_steps",
            "heldout_every_steps",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                rules.in_range(f"distill.{name}", getattr(self, name), low=1)
        rules.in_range("distill.recompute_share", self.recompute_share, low=0, high=1)
        rules.one_of("distill.attention", self.attention, ("auto", "varlen", "masked"))
        rules.one_of(
            "distill.teacher_placement", self.teacher_placement, ("replicated", "node", "sharded")
        )
        if self.teacher_dtype is not None:
            known = ("float32", "bfloat16", "float8")
            rules.one_of("distill.teacher_dtype", self.teacher_dtype, known)
            if self.teacher_dtype == "float8" and self.teacher_placement != "replicated":
                raise InputError(
                    f"distill.teacher_dtype=float8 with distill.teacher_placement="
                    f"{self.teacher_placement}: a teacher in 8 bits is kept whole on every worker; "
                    "use distill.teacher_placement=replicated, or another type"
                )
        if self.time_limit_hours is not None:
            rules.in_range("distill.time_limit_hours", self.time_limit_hours, above=0)
        rules.one_of("distill.on_bad_step", self.on_bad_step, ("skip", "rollback", "stop"))
        rules.in_range("distill.moving_share", self.moving_share, low=0, below=1)
        rules.one_of("distill.moving_start", self.moving_start, ("given", "dense"))
        if self.moving_start == "dense" and not self.moving_share:
            raise InputError(
                "distill.moving_start=dense with distill.moving_share=0: masks that stay cut the "
                "dense weights before the first step; set distill.moving_share=0.25, or use "
                "distill.moving_start=given"
            )
        for name in ("time_reserve_s", "max_bad_steps", "mask_decay"):
            rules.in_range(f"distill.{name}", getattr(self, name), low=0)
        for name in (
            "learning_rate", "max_grad_norm", "temperature", "mtbf_hours", "hang_after_s",
            "pause_limit_s",
        ):  # fmt: skip
            rules.in_range(f"distill.{name}", getattr(self, name), above=0)
        weights = ("kl_weight", "reverse_kl_weight", "ce_weight", "square_head_weight")
        for name in ("num_warmup_steps", "weight_decay", *weights):
            rules.in_range(f"distill.{name}", getattr(self, name), low=0)
        if not any(getattr(self, name) for name in weights):
            raise InputError(
                "distill: every loss weight is 0, so nothing is learned; set at least one of "
                + ", ".join(f"distill.{name}" for name in weights)
            )
        cache_fits(self, self.losses())
        rules.in_range("distill.min_learning_rate_share", self.min_learning_rate_share, 0, 1)
        rules.in_range("distill.beta1", self.beta1, low=0, below=1)
        rules.in_range("distill.beta2", self.beta2, low=0, below=1)
        rules.one_of("distill.precision", self.precision, ("fp32", "bf16"))
        if self.precision == "bf16" and self.zero_stage == 0:
            raise InputError(
                "distill.zero_stage=0 with distill.precision=bf16: DeepSpeed keeps no float32 "
                "masters there; use distill.zero_stage=1 or more, or distill.precision=fp32"
            )
        rules.in_range("distill.zero_stage", self.zero_stage, low=0, high=3)
        if self.zero_hpz_size > 1 and self.zero_stage != 3:
            raise InputError(
                f"distill.zero_hpz_size={self.zero_hpz_size} with distill.zero_stage="
                f"{self.zero_stage}: the second copy is of weights that only ZeRO-3 splits; use "
                "distill.zero_stage=3, or distill.zero_hpz_size=1"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise InputError(
                "distill.offload_optimizer=true with distill.zero_stage=0: only ZeRO offloads; use "
                "distill.zero_stage=1 or more"
            )

    def losses(self) -> LossSchedule:
        """The terms of the loss over the run.

        Raises:
            InputError: a number out of range, or a moment at which every weight is 0.
        """
        start = LossWeights(
            kl=self.kl_weight, ce=self.ce_weight, square_head=self.square_head_weight,
            temperature=self.temperature, reverse_kl=self.reverse_kl_weight,
        )  # fmt: skip
        return LossSchedule.parse(start, self.schedule)
