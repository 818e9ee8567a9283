"""What each stage can be told; one dataclass a stage, gathered in conf/schema.py.

The string under a field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from conf import rules
from sparsify.errors import InputError
from sparsify.loss_terms import LossSchedule, LossWeights


@dataclass
class PruneConfig:
    """One-shot pruning."""

    method: str = "twofour"
    """method whose result goes on to recovery: one file of sparsify/methods"""
    baselines: list[str] = field(default_factory=lambda: ["magnitude", "wanda", "sparsegpt"])
    """other methods to run and report beside it; [] for none"""
    pattern: str = "2:4"
    """N:M keeps N of every M consecutive weights of a row; or unstructured:SHARE OF ZEROS"""
    num_samples: int = 128
    """calibration rows (of data.sequence_length tokens)"""
    damping: float = 0.01
    """share of the Hessian's mean diagonal added to its diagonal; over 0, at most 1"""
    block_size: int = 128
    """columns per lazy update, a multiple of M; with N:M it changes speed only"""
    batch_size: int = 8
    """calibration rows per forward on one worker; changes memory and speed only"""
    skip: list[str] = field(default_factory=list)
    """glob patterns of linear layers left dense, such as [*.down_proj]"""
    order: str = "auto"
    """when inputs are measured: layer (each behind the pruned layers before it in the block), block
    (all of a block at once, as SparseGPT's authors do), dense (as if nothing was pruned: one pass,
    no method with a teacher), or auto, as is best for the method"""
    existing: str = "ignore"
    """zeros that the model has: ignore, extend (they stay, others join them) or keep (the mask)"""
    teacher_share: float = 1.0
    """how far layers are fitted to the dense model's outputs on its own inputs; 0 to 1"""
    residual_share: float = 1.0
    """how far layers make up for errors of the residual stream they add to; 0 to 1"""
    refit_iterations: int = 10
    """steps of the conjugate gradients that re-solve the kept weights; 0 for none"""
    descent_sweeps: int = 3
    """sweeps of the descent over groups of columns; 0 for none"""
    admm_iterations: int = 10
    """iterations of method admm"""
    fisher: bool = False
    """count calibration tokens by how strongly predictions depend on them (one backward pass)"""
    rotation_steps: int | None = None
    """steps of the search for rotations to fold into the weights first; 0 for none; null: 30 with
    method=twofour, where the model allows it and its files have at most 32 GB"""
    budget: str | None = None
    """size:S or latency:S: leave layers dense up to the share S of the dense cost; null for none"""
    reduction: str = "fast"
    """order of sums over workers: fast, or fixed (same bits with 1, 2, 4 or 8 workers)"""
    activations: str = "auto"
    """where hidden states wait between blocks: auto, device, host or disk"""
    overlap: bool = False
    """while layers are solved, have the dense model pass the next block (methods with a teacher;
    prune.order=dense) and Hessians factored (orders block and dense): the same bits for more memory
    and, on a CPU, more cores"""
    checkpoint_every_blocks: int = 1
    """blocks between two states that a killed run can go on from"""

    def __post_init__(self) -> None:
        rules.one_of("prune.method", self.method, rules.method_names())
        for name in self.baselines:
            rules.one_of("prune.baselines", name, rules.method_names())
        rules.no_duplicates("prune.baselines", self.baselines)
        rules.pattern_syntax("prune.pattern", self.pattern)
        for name in ("num_samples", "block_size", "batch_size", "checkpoint_every_blocks"):
            rules.in_range(f"prune.{name}", getattr(self, name), low=1)
        for name in ("refit_iterations", "descent_sweeps", "admm_iterations"):
            rules.in_range(f"prune.{name}", getattr(self, name), low=0)
        if self.rotation_steps is not None:
            rules.in_range("prune.rotation_steps", self.rotation_steps, low=0)
        for name in ("teacher_share", "residual_share"):
            rules.in_range(f"prune.{name}", getattr(self, name), low=0, high=1)
        rules.budget_syntax("prune.budget", self.budget)
        rules.one_of("prune.order", self.order, ("auto", "layer", "block", "dense"))
        rules.one_of("prune.existing", self.existing, ("ignore", "extend", "keep"))
        if self.rotation_steps and self.existing != "ignore":
            raise InputError(
                f"prune.rotation_steps={self.rotation_steps}: rotations fill the zeros that "
                f"prune.existing={self.existing} is about; use prune.existing=ignore, or "
                "prune.rotation_steps=0"
            )
        rules.one_of("prune.reduction", self.reduction, ("fast", "fixed"))
        rules.one_of("prune.activations", self.activations, ("auto", "device", "host", "disk"))
        if self.overlap and self.activations in ("host", "disk"):
            raise InputError(
                f"prune.overlap=true with prune.activations={self.activations}: what the dense "
                "model does ahead is kept on the device; use prune.activations=device, or "
                "prune.overlap=false"
            )
        rules.in_range("prune.damping", self.damping, above=0, high=1)
        rules.block_fits_pattern(self.block_size, self.pattern)


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
        rules.cache_fits(self, self.losses())
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


@dataclass
class EvaluateConfig:
    """Perplexity and agreement with the dense model on held-out text."""

    num_tokens: int = 65_536
    """held-out tokens scored, at most"""
    batch_size: int = 8
    """rows per forward on one worker; changes memory and speed only"""

    def __post_init__(self) -> None:
        rules.in_range("evaluate.num_tokens", self.num_tokens, low=1)
        rules.in_range("evaluate.batch_size", self.batch_size, low=1)


@dataclass
class QuantizeConfig:
    """Low-bit weights that leave every zero where it is."""

    method: str = "gptq"
    """gptq (error carried to later columns) or rtn (round to nearest, no calibration)"""
    bits: int = 4
    """bits per kept weight: 4 or 8"""
    group_size: int = 128
    """consecutive columns of a row that share one scale"""
    num_samples: int = 256
    """calibration rows (of data.sequence_length tokens)"""
    damping: float = 0.01
    """share of the Hessian's mean diagonal added to its diagonal; over 0, at most 1"""
    batch_size: int = 8
    """calibration rows per forward on one worker; changes memory and speed only"""

    def __post_init__(self) -> None:
        rules.one_of("quantize.method", self.method, ("gptq", "rtn"))
        rules.one_of("quantize.bits", self.bits, (4, 8))
        for name in ("group_size", "num_samples", "batch_size"):
            rules.in_range(f"quantize.{name}", getattr(self, name), low=1)
        rules.in_range("quantize.damping", self.damping, above=0, high=1)


@dataclass
class ExportConfig:
    """The files to deploy."""

    dtype: str | None = None
    """type of the exported weights: float32, bfloat16 or float16; null = as trained"""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            rules.one_of("export.dtype", self.dtype, rules.DTYPES)
