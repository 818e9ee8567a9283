"""What a run can be told: every option with its type, unit and rules.

The dataclasses own names, types, rules and defaults; the YAML files beside this one hold what a
command, a cluster or a recipe sets otherwise. The string under a field is its help text.
Nothing here reads files of the run, the environment or the clock, and nothing imports Hydra, Ray
or torch. Nobody changes a config after it was made: use `dataclasses.replace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Self

from cluster.stages import STAGED, StagedClusterSpec
from conf import checks as rules
from conf.checks import Given
from conf.options.data import DataConfig
from conf.options.distill import DistillConfig, batch_fits_workers
from conf.options.drop import DropConfig
from conf.options.evaluate import EvaluateConfig
from conf.options.export import ExportConfig
from conf.options.finetune import FinetuneConfig
from conf.options.model import HUB_NAME, ModelConfig
from conf.options.plan import PlanConfig
from conf.options.pretrain import PretrainConfig
from conf.options.prune import PruneConfig
from conf.options.quantize import QuantizeConfig
from conf.options.run import STAGES, USUAL, RunConfig
from conf.options.tracker import TrackerConfig
from sparsify.errors import InputError
from sparsify.params import as_list, close_match, no_duplicates


def stages_in_order(stages: Sequence[str], known: Sequence[str]) -> None:
    """Require at least one stage, each known, each once, in the order in which stages run."""
    order = f"stages run in this order: {', '.join(known)}"
    if not stages:
        raise InputError(f"stages=[]: nothing to do; name at least one; {order}")
    for name in stages:
        if name not in known:
            raise InputError(
                f"stages={as_list(stages)}: unknown stage {name!r}{close_match(name, known)}; "
                f"{order}"
            )
    no_duplicates("stages", stages)
    wanted = [name for name in known if name in stages]
    if list(stages) != wanted:
        raise InputError(f"stages={as_list(stages)}: out of order; use stages={as_list(wanted)}")


def pretrains_alone(stages: Sequence[str], from_: str | None) -> None:
    """Require that a run that makes a dense model does nothing else, and starts from nothing."""
    if "pretrain" not in stages:
        return
    if len(stages) > 1:
        raise InputError(
            f"stages={as_list(stages)}: pretrain makes the dense model that other stages start "
            "from; run python -m jobs.pretrain, and then these with model.path=RUN/pretrain/model"
        )
    if from_ is not None:
        raise InputError(
            f"run.from={from_}: pretrain starts from random weights; leave it out, or train a "
            "model further with python -m jobs.finetune"
        )


def starts_from_something(stages: Sequence[str], from_: str | None, path: str) -> None:
    """Require run.from where no stage of the run makes a model of the dense one; a model that is
    only evaluated may be model.path too."""
    if {"pretrain", "drop", "prune", "finetune"}.intersection(stages) or from_ is not None:
        return
    if list(stages) == ["evaluate"] and path != ModelConfig().path:
        return
    raise InputError(
        f"run.from: is required because stages={as_list(stages)} does not start with prune; "
        "give an earlier run or a model folder, for example run.from=runs/embedded-2-4-twofour"
    )


def redo_within_stages(redo: Sequence[str], stages: Sequence[str]) -> None:
    """Require that stages to redo are stages of this run."""
    for name in redo:
        if name != "all" and name not in stages:
            raise InputError(
                f"run.redo={as_list(redo)}: {name!r} is not a stage of this run; "
                f"use some of {', '.join(stages)}, or all"
            )


def until_within_stages(until: str | None, stages: Sequence[str]) -> None:
    """Require that the stage to stop after is one of this run."""
    if until is not None and until not in stages:
        raise InputError(
            f"run.until={until}: is not a stage of this run; use one of {', '.join(stages)}"
        )


ALIASES = {"from": "from_"}
"""Name as people write it -> dataclass field, where Python reserves the word."""


@dataclass
class Config:
    """A whole run of the pipeline, or of one of its stages."""

    stages: list[str] = field(default_factory=lambda: list(USUAL))
    """stages to run, in this order: drop, prune, distill, finetune, evaluate, quantize, export,
    report; drop and finetune only where they are named; or pretrain alone"""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    drop: DropConfig = field(default_factory=DropConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    cluster: StagedClusterSpec = field(default_factory=StagedClusterSpec)

    def __post_init__(self) -> None:
        stages_in_order(self.stages, STAGES)
        pretrains_alone(self.stages, self.run.from_)
        starts_from_something(self.stages, self.run.from_, self.model.path)
        redo_within_stages(self.run.redo, self.stages)
        until_within_stages(self.run.until, self.stages)
        for stage in self.stages:
            if stage in STAGED:
                rules.half_needs_gpu(self.model.dtype, self.cluster.of_stage(stage))
        if "drop" in self.stages:
            self.drop.require_whole()
            if "distill" in self.stages and self.distill.moving_start == "dense":
                raise InputError(
                    "distill.moving_start=dense: the dense model has layers that drop takes out; "
                    "use distill.moving_start=given"
                )
        if "prune" in self.stages and self.model.teacher not in (None, self.model.path):
            raise InputError(
                f"model.teacher={self.model.teacher}: a run that prunes learns from model.path "
                "itself; leave model.teacher out"
            )
        length = Given.of("data.sequence_length", self.data)
        if "distill" in self.stages:
            batch_fits_workers(self.distill, self.cluster)
            rules.one_step(Given.of("distill.num_tokens", self.distill),
                           Given.of("distill.batch_size", self.distill), length)  # fmt: skip
        if "finetune" in self.stages:
            self.finetune.check_teacher()
            batch_fits_workers(self.finetune, self.cluster, "finetune")
        if "pretrain" in self.stages:
            batch_fits_workers(self.pretrain, self.cluster, "pretrain")
            rules.one_step(Given.of("pretrain.num_tokens", self.pretrain),
                           Given.of("pretrain.batch_size", self.pretrain), length)  # fmt: skip
        if {"pretrain", "evaluate", "quantize"}.intersection(self.stages):
            rules.one_row(Given.of("evaluate.num_tokens", self.evaluate), length)

    def of_stage(self, stage: str) -> Self:
        """The config as one stage sees it, whose cluster is what the stage asks for."""
        own = copy(self)  # no `replace`: the rules of other stages look at their own clusters
        own.cluster = self.cluster.of_stage(stage)
        return own


@dataclass
class PlanJobConfig(Config):
    """Say what a run takes, before it starts (job plan)."""

    plan: PlanConfig = field(default_factory=PlanConfig)


def written_name(field_name: str) -> str:
    """The name people write for a field: `from` for `from_`, and every other name unchanged."""
    return next((name for name, alias in ALIASES.items() if alias == field_name), field_name)


def to_dict(config: Any, deciding: bool = False) -> dict[str, Any]:
    """`config` as plain nested values under the names people write; fit for JSON and YAML.

    `deciding` leaves out what decides memory and speed alone, and a result by rounding at most.
    """
    plain: dict[str, Any] = {}
    for item in fields(config):
        if deciding and item.metadata.get("speed_only"):
            continue
        value = getattr(config, item.name)
        if is_dataclass(value):
            value = to_dict(value, deciding)
        plain[written_name(item.name)] = list(value) if isinstance(value, list) else value
    return plain


def default_run_dir(config: Config) -> str:
    """Run folder when run.dir is null: what the run is made from and how, without a colon.

    A run that prunes gives `runs/embedded-2-4-twofour`; one that starts from
    `runs/embedded-2-4-twofour` or its stage folder and quantizes adds `-quantize`.
    """
    if "pretrain" in config.stages:
        return "runs/pretrain"
    if config.run.from_ is None or "prune" in config.stages:
        name = config.model.path.rstrip("/")
        if HUB_NAME.fullmatch(name):  # a revision may have slashes too
            name, _, revision = name.partition("@")
            name += f"-{revision.replace('/', '-')}" if revision else ""
        name = name.rsplit("/", 1)[-1] or "model"
        dropped = f"-drop-{config.drop.rule}" if "drop" in config.stages else ""
        if "prune" not in config.stages:
            rest = [f"-{stage}" for stage in config.stages if stage != "drop"]
            return f"runs/{name}{dropped}{''.join(rest)}"
        pattern = config.prune.pattern.replace(":", "-")
        return f"runs/{name}{dropped}-{pattern}-{config.prune.method}"
    parts = [part for part in config.run.from_.split("/") if part not in ("", ".", "..")]
    while len(parts) > 1 and parts[-1] in STAGES:
        parts.pop()
    return f"runs/{parts[-1] if parts else 'model'}-{'-'.join(config.stages)}"
