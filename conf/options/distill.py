"""Options distill.*: recovery by distillation."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.stages import StagedClusterSpec
from conf.checks import nearest_multiples
from sparsify.errors import InputError
from sparsify.params import LossSchedule, LossWeights, check_options, option


def batch_fits_workers(distill: DistillConfig, cluster: StagedClusterSpec) -> None:
    """Require that a step splits into equal micro-batches on every worker."""
    own, num_workers = cluster.stages.distill.num_workers, cluster.of_stage("distill").num_workers
    name = "cluster.num_workers" if own is None else "cluster.stages.distill.num_workers"
    unit = distill.micro_batch_size * num_workers
    if distill.batch_size % unit:
        raise InputError(
            f"distill.batch_size={distill.batch_size} with distill.micro_batch_size="
            f"{distill.micro_batch_size} and {name}={num_workers}: must be a multiple "
            f"of {unit} = micro_batch_size x num_workers; use distill.batch_size="
            f"{nearest_multiples(distill.batch_size, unit)}, or a smaller distill.micro_batch_size"
        )


def cache_fits(distill: DistillConfig, losses: LossSchedule) -> None:
    """Require that a sample of the teacher is all that the recovery asks of the teacher."""
    field = f"distill.teacher_cache={distill.teacher_cache}"
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

    num_tokens: int = option(1_000_000, low=1)
    """tokens to train on"""
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
    attention: str = option("auto", one_of=("auto", "varlen", "masked"), speed_only=True)
    """over rows of several documents: varlen (within each document), masked (over the whole row) or
    auto: varlen for a model that is found to compute the same with it, else masked"""
    teacher_placement: str = option(
        "replicated", one_of=("replicated", "node", "sharded"), speed_only=True
    )
    """the teacher on every worker (replicated), split over a node's (node) or over all (sharded);
    with distill.teacher_cache there is none to place"""
    teacher_dtype: str | None = option(None, one_of=("float32", "bfloat16", "float8"))
    """type of the teacher's weights: float32, bfloat16 or float8; null = as distill.precision"""
    teacher_cache: str | None = option(None, is_path=True)
    """folder of jobs.teach over the rows of data.train: no teacher is loaded; null = the teacher"""
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
    """hours after which the stage stops with a checkpoint, to resume later; null = never"""
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
    moving_share: float = option(0.0, low=0, below=1)
    """share of the steps in which masks follow the weights (SR-STE); 0 = they never move"""
    moving_start: str = option("given", one_of=("given", "dense"))
    """weights to begin with where masks move: those of run.from (given, which may be dense), or the
    dense model's under the masks of run.from (dense)"""
    mask_refresh_steps: int = option(10, low=1)
    """steps between two choices of the masks while they move"""
    mask_decay: float = option(2e-4, low=0)
    """weight of pruned weights in their own gradient while masks move"""

    def __post_init__(self) -> None:
        check_options(self, "distill")
        if self.teacher_dtype == "float8" and self.teacher_placement != "replicated":
            raise InputError(
                f"distill.teacher_dtype=float8 with distill.teacher_placement="
                f"{self.teacher_placement}: a teacher in 8 bits is kept whole on every worker; "
                "use distill.teacher_placement=replicated, or another type"
            )
        if self.moving_start == "dense" and not self.moving_share:
            raise InputError(
                "distill.moving_start=dense with distill.moving_share=0: masks that stay cut the "
                "dense weights before the first step; set distill.moving_share=0.25, or use "
                "distill.moving_start=given"
            )
        weights = ("kl_weight", "reverse_kl_weight", "ce_weight", "square_head_weight")
        if not any(getattr(self, name) for name in weights):
            raise InputError(
                " and ".join(f"distill.{name}=0" for name in weights)
                + ": every loss weight is 0, so nothing is learned; set at least one of them"
            )
        cache_fits(self, self.losses())
        if self.precision == "bf16" and self.zero_stage == 0:
            raise InputError(
                "distill.zero_stage=0 with distill.precision=bf16: DeepSpeed keeps no float32 "
                "masters there; use distill.zero_stage=1 or more, or distill.precision=fp32"
            )
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
