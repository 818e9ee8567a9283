"""Options distill.*: recovery by distillation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from cluster.stages import StagedClusterSpec
from conf.checks import nearest_multiples
from conf.options.training import TrainingConfig
from sparsify.errors import InputError
from sparsify.params import LossSchedule, LossWeights, check_options, option


def batch_fits_workers(
    config: TrainingConfig, cluster: StagedClusterSpec, stage: str = "distill"
) -> None:
    """Require that a step splits into equal micro-batches on every worker."""
    own = getattr(cluster.stages, stage).num_workers
    num_workers = cluster.of_stage(stage).num_workers
    name = "cluster.num_workers" if own is None else f"cluster.stages.{stage}.num_workers"
    unit = config.micro_batch_size * num_workers
    if config.batch_size % unit:
        raise InputError(
            f"{stage}.batch_size={config.batch_size} with {stage}.micro_batch_size="
            f"{config.micro_batch_size} and {name}={num_workers}: must be a multiple "
            f"of {unit} = micro_batch_size x num_workers; use {stage}.batch_size="
            f"{nearest_multiples(config.batch_size, unit)}, or a smaller {stage}.micro_batch_size"
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
class DistillConfig(TrainingConfig):
    """Recovery by distillation from the dense model, the zeros held."""

    num_tokens: int = option(1_000_000, low=1)
    """tokens to train on"""
    teacher_cache: str | None = option(None, is_path=True)
    """folder of jobs.teach over the rows of data.train: no teacher is loaded; null = the teacher"""
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
        if self.on_time_limit == "finish":
            if self.time_limit_hours is None:
                raise InputError(
                    "distill.on_time_limit=finish: there is no limit; set "
                    "distill.time_limit_hours, or leave it out"
                )
            if self.moving_share:
                raise InputError(
                    f"distill.moving_share={self.moving_share:g} with distill.on_time_limit=finish:"
                    " masks that still move at the end would not be kept; use "
                    "distill.on_time_limit=stop"
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


def as_distillation(
    config: TrainingConfig, stage: str, num_tokens: int, **changes: Any
) -> DistillConfig:
    """Another training as options of the engine.

    Args:
        config: of the stage.
        stage: its name, which messages say.
        num_tokens: to train on.
        changes: values other than those of `config`.

    Raises:
        InputError: a rule of training is broken.
    """
    shared = {item.name: getattr(config, item.name) for item in fields(TrainingConfig)} | changes
    try:
        return DistillConfig(num_tokens=num_tokens, **shared)
    except InputError as error:
        raise InputError(str(error).replace("distill", stage)) from None
