"""What a run can be told: every option with its type, unit and rules.

The dataclasses own names, types and rules; the YAML files beside this one own the values a job
starts from (a test holds both to the same defaults). The string under a field is its help text.
Nothing here reads files of the run, the environment or the clock, and nothing imports Hydra, Ray
or torch. Nobody changes a config after it was made: use `dataclasses.replace`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from cluster.spec import ClusterSpec
from conf import rules
from conf.stages import (
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    PruneConfig,
    QuantizeConfig,
)
from sparsify.errors import InputError

STAGES = ("prune", "distill", "evaluate", "quantize", "export", "report")
"""Every stage, in the only order in which stages run."""

ALIASES = {"from": "from_"}
"""Name as people write it -> dataclass field, where Python reserves the word."""


@dataclass
class RunConfig:
    """Where the run lives and what it starts from."""

    dir: str | None = None
    """run folder; null = runs/<model name>-<pattern>-<method>"""
    from_: str | None = None
    """what to start from: an earlier run, one of its stage folders, or a model folder"""
    seed: int = 0
    """orders calibration and training rows; same seed, same result"""
    redo: list[str] = field(default_factory=list)
    """stages to run again though their results could be reused, or [all]"""

    def __post_init__(self) -> None:
        rules.in_range("run.seed", self.seed, low=0, high=2**63 - 1)
        rules.not_blank("run.dir", self.dir, optional=True)
        rules.not_blank("run.from", self.from_, optional=True)
        rules.no_duplicates("run.redo", self.redo)
        for name in self.redo:
            rules.one_of("run.redo", name, (*STAGES, "all"))
        if "all" in self.redo and len(self.redo) > 1:
            raise InputError(
                f"run.redo={rules.as_list(self.redo)}: 'all' stands alone; use run.redo=[all]"
            )


@dataclass
class ModelConfig:
    """The model to make sparse."""

    path: str = "embedded"
    """model folder in Hugging Face layout (safetensors), or 'embedded' for the packaged one"""
    teacher: str | None = None
    """dense model to learn from and compare with; null = model.path, or what run.from came from"""
    dtype: str = "float32"
    """type the weights are held in: float32, bfloat16 or float16"""

    def __post_init__(self) -> None:
        rules.not_blank("model.path", self.path)
        rules.not_blank("model.teacher", self.teacher, optional=True)
        rules.one_of("model.dtype", self.dtype, rules.DTYPES)


@dataclass
class DataConfig:
    """Text for calibration, recovery and evaluation."""

    calibration: str = "stdlib"
    """calibration source: stdlib, packages, code, a text or JSONL file, a folder, or a dataset"""
    mix: list[str] = field(default_factory=list)
    """sources with their weights, such as [0.7 stdlib,0.3 a.txt], instead of data.calibration"""
    train: str | None = None
    """source of recovery text; null = the calibration source or mix"""
    heldout: str | None = None
    """source of evaluation text; null = the held-out part of data.calibration"""
    text_field: str = "text"
    """field of a JSONL line or dataset row that holds the text"""
    separator: str = "<|endoftext|>"
    """text between two documents of a plain text file"""
    heldout_share: float = 0.05
    """share of the documents held out from calibration and training; over 0, at most 0.5"""
    sequence_length: int = 256
    """tokens per row, in every stage; at least 8"""
    isolate_documents: bool = True
    """documents packed into one row do not attend to each other; positions restart"""

    def __post_init__(self) -> None:
        rules.parse_mix("data.mix", self.mix)
        for name in ("calibration", "text_field"):
            rules.not_blank(f"data.{name}", getattr(self, name))
        rules.not_blank("data.train", self.train, optional=True)
        rules.not_blank("data.heldout", self.heldout, optional=True)
        if not self.separator:
            raise InputError("data.separator: is empty; give the text between two documents")
        rules.in_range("data.heldout_share", self.heldout_share, above=0, high=0.5)
        rules.in_range("data.sequence_length", self.sequence_length, low=8)


@dataclass
class TrackerConfig:
    """Metrics: always a JSONL file in the run folder, and Weights & Biases on top."""

    wandb: str = "auto"
    """auto (online with a key, offline without), online, offline or off"""
    project: str = "twofour"
    """Weights & Biases project"""
    name: str | None = None
    """name of the run there; null = name of the run folder"""

    def __post_init__(self) -> None:
        rules.one_of("tracker.wandb", self.wandb, ("auto", "online", "offline", "off"))
        rules.not_blank("tracker.project", self.project)
        rules.not_blank("tracker.name", self.name, optional=True)
        if bad := sorted(set(self.project) & set("/\\#?%:")):
            raise InputError(
                f"tracker.project={self.project}: Weights & Biases refuses {' '.join(bad)} in "
                "project names; use letters, digits, '-' and '_'"
            )


@dataclass
class PretrainConfig:
    """Train the small embedded model from scratch (job pretrain, one process)."""

    out: str = "sparsify/embedded"
    """model folder to write"""
    data: str = "code"
    """code (standard library and packages), or a source as in data.calibration of jobs.prune"""
    vocab_size: int = 1024
    """tokens of the byte-level vocabulary; at least 257"""
    hidden_size: int = 128
    """width of the model"""
    intermediate_size: int = 256
    """width of the feed-forward part"""
    num_layers: int = 4
    """decoder blocks"""
    num_heads: int = 4
    """attention heads; divides hidden_size into heads of even width"""
    num_kv_heads: int = 2
    """key and value heads; divides num_heads"""
    sequence_length: int = 256
    """tokens per row, and the model's longest context; at least 8"""
    num_tokens: int = 44_040_192
    """tokens to train on"""
    stdlib_repeats: int = 3
    """times the standard library is used for each use of the installed packages (data=code)"""
    batch_size: int = 32
    """rows per step"""
    learning_rate: float = 3e-3
    """peak learning rate, after warm-up"""
    num_warmup_steps: int = 100
    """steps of linear warm-up"""
    weight_decay: float = 0.1
    """decoupled weight decay of matrices"""
    max_grad_norm: float = 1.0
    """gradient norm above which a step is scaled down"""
    bf16: bool = True
    """forward and backward in bfloat16, weights in float32"""
    device: str = "cpu"
    """cpu or cuda"""
    seed: int = 0
    """initial weights and order of the rows"""
    num_threads: int = 2
    """CPU threads"""

    def __post_init__(self) -> None:
        rules.not_blank("out", self.out)
        rules.not_blank("data", self.data)
        rules.one_of("device", self.device, ("cpu", "cuda"))
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "num_tokens", "stdlib_repeats", "batch_size", "num_threads"):
            rules.in_range(name, getattr(self, name), low=1)
        rules.in_range("vocab_size", self.vocab_size, low=257)
        rules.in_range("sequence_length", self.sequence_length, low=8)
        rules.in_range("seed", self.seed, low=0, high=2**63 - 1)
        for name in ("learning_rate", "max_grad_norm"):
            rules.in_range(name, getattr(self, name), above=0)
        for name in ("weight_decay", "num_warmup_steps"):
            rules.in_range(name, getattr(self, name), low=0)
        rules.one_step("num_tokens", self.num_tokens, self.batch_size, self.sequence_length)
        rules.heads_fit(self.hidden_size, self.num_heads, self.num_kv_heads)


@dataclass
class Config:
    """A whole run of the pipeline, or of one of its stages."""

    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """stages to run, in this order: prune, distill, evaluate, quantize, export, report"""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)

    def __post_init__(self) -> None:
        rules.stages_in_order(self.stages, STAGES)
        rules.starts_from_something(self.stages, self.run.from_)
        rules.redo_within_stages(self.run.redo, self.stages)
        rules.half_needs_gpu(self.model.dtype, self.cluster)
        if "prune" in self.stages and self.model.teacher not in (None, self.model.path):
            raise InputError(
                f"model.teacher={self.model.teacher}: a run that prunes learns from model.path "
                "itself; leave model.teacher out"
            )
        if "distill" in self.stages:
            rules.batch_fits_workers(self.distill, self.cluster.num_workers)
            rules.one_step("distill.num_tokens", self.distill.num_tokens,
                           self.distill.batch_size, self.data.sequence_length)  # fmt: skip
        if {"evaluate", "quantize"}.intersection(self.stages):
            rules.one_row("evaluate.num_tokens", self.evaluate.num_tokens,
                          self.data.sequence_length)  # fmt: skip


def written_name(field_name: str) -> str:
    """The name people write for a field: `from` for `from_`, and every other name unchanged."""
    return next((name for name, alias in ALIASES.items() if alias == field_name), field_name)


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as plain nested values under the names people write; fit for JSON and YAML."""
    plain: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            value = to_dict(value)
        plain[written_name(item.name)] = list(value) if isinstance(value, list) else value
    return plain


def default_run_dir(config: Config) -> str:
    """Run folder when run.dir is null: what the run is made from and how, without a colon.

    A run that prunes gives `runs/embedded-2-4-twofour`; one that starts from
    `runs/embedded-2-4-twofour` or its stage folder and quantizes adds `-quantize`.
    """
    if config.run.from_ is None or "prune" in config.stages:
        name = config.model.path.rstrip("/").rsplit("/", 1)[-1] or "model"
        pattern = config.prune.pattern.replace(":", "-")
        return f"runs/{name}-{pattern}-{config.prune.method}"
    parts = [part for part in config.run.from_.split("/") if part not in ("", ".", "..")]
    while len(parts) > 1 and parts[-1] in STAGES:
        parts.pop()
    return f"runs/{parts[-1] if parts else 'model'}-{'-'.join(config.stages)}"
