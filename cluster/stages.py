"""What single stages of a run ask of the cluster instead of what the run asks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.spec import ClusterSpec


@dataclass
class StageSlurmSpec:
    """What one stage asks of Slurm; null = what cluster.slurm says."""

    partition: str | None = None
    """partition, or several with commas"""
    qos: str | None = None
    """quality of service"""
    time: str | None = None
    """time limit of the job that does this stage"""
    constraint: str | None = None
    """features that every node must have"""
    gpu_type: str | None = None
    """name of the GPUs in the site's Slurm"""
    memory: str | None = None
    """memory per node, such as 900G; 0 = all of it"""


@dataclass
class StageSpec:
    """What a stage asks for (STAGE: any of `stages` but report); null = the run's.

    Size and machines may be a stage's own. How work is started, who pays and what is found there
    (kind, account, modules, container) are the run's, whose stages read and write one folder.
    """

    num_nodes: int | None = None
    """machines the stage needs"""
    num_workers: int | None = None
    """worker processes in all"""
    cpus_per_worker: float | None = None
    """CPU cores reserved per worker"""
    gpus_per_worker: float | None = None
    """GPUs reserved per worker, 0 or 1"""
    threads_per_worker: int | None = None
    """threads per worker for CPU maths"""
    card: str | None = None
    """GPU by its name in `jobs.plan`"""
    slurm: StageSlurmSpec = field(default_factory=StageSlurmSpec)


@dataclass
class StageSpecs:
    """Every stage that has workers, by its name; the others are done by the command itself."""

    pretrain: StageSpec = field(default_factory=StageSpec)
    drop: StageSpec = field(default_factory=StageSpec)
    prune: StageSpec = field(default_factory=StageSpec)
    distill: StageSpec = field(default_factory=StageSpec)
    finetune: StageSpec = field(default_factory=StageSpec)
    evaluate: StageSpec = field(default_factory=StageSpec)
    quantize: StageSpec = field(default_factory=StageSpec)
    export: StageSpec = field(default_factory=StageSpec)


STAGED = tuple(item.name for item in dataclasses.fields(StageSpecs))
"""Names of the stages that have workers."""


@dataclass
class StagedClusterSpec(ClusterSpec):
    """Size and limits of the machine or cluster that a run uses, and what its stages change."""

    stages: StageSpecs = field(default_factory=StageSpecs)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in STAGED:
            if getattr(self.stages, name) != StageSpec():
                self.of_stage(name)

    def of_stage(self, stage: str) -> StagedClusterSpec:
        """The cluster as one stage asks for it; the run's own for a stage without workers.

        Raises:
            ValueError: what the stage asks for breaks a rule of the option that it stands for.
        """
        asked = getattr(self.stages, stage, StageSpec())
        changes, slurm = _given(asked), _given(asked.slurm)
        if asked.gpus_per_worker == 0:
            changes.setdefault("card", None)
        try:
            return dataclasses.replace(
                self, stages=StageSpecs(), slurm=dataclasses.replace(self.slurm, **slurm), **changes
            )
        except ValueError as error:
            message = str(error)
            for name in [*changes, *(f"slurm.{name}" for name in slurm)]:
                message = message.replace(f"cluster.{name}=", f"cluster.stages.{stage}.{name}=")
            raise ValueError(message) from None

    def parts(self, stages: Sequence[str]) -> list[tuple[str, ...]]:
        """The stages, those together that follow each other and ask for the same allocation."""
        found: list[tuple[str, ...]] = []
        before: Any = None
        for stage in stages:
            own, asks = self.of_stage(stage), before
            if stage in STAGED:
                asks = (own.num_nodes, _per_node(own), own.slurm)
            if found and before in (None, asks):
                found[-1] += (stage,)
            else:
                found.append((stage,))
            before = asks
        return found

    def largest(self, stages: Sequence[str]) -> StagedClusterSpec:
        """One allocation in which each of the stages finds what it asks for."""
        specs = [self.of_stage(stage) for stage in stages if stage in STAGED]
        if len({_workers(spec) for spec in specs}) < 2:
            return specs[0] if specs else self
        cpus, gpus = (max(amounts) for amounts in zip(*map(_per_node, specs), strict=True))
        num_nodes = max(spec.num_nodes for spec in specs)
        per_node = gpus or max(math.ceil(spec.num_workers / spec.num_nodes) for spec in specs)
        return dataclasses.replace(
            self, stages=StageSpecs(), num_nodes=num_nodes, num_workers=num_nodes * per_node,
            cpus_per_worker=math.floor(1e6 * cpus / per_node) / 1e6,  # whole cores when rounded up
            gpus_per_worker=1 if gpus else 0,
        )  # fmt: skip

    def has_workers_of(self, other: ClusterSpec) -> bool:
        """Whether what runs the work of `other` can run this one's as it is."""
        return _workers(self) == _workers(other)


def _given(asked: Any) -> dict[str, Any]:
    """The options of a dataclass that are set, without groups of them."""
    values = {item.name: getattr(asked, item.name) for item in dataclasses.fields(asked)}
    return {
        name: value
        for name, value in values.items()
        if value is not None and not dataclasses.is_dataclass(value)
    }


def _workers(spec: ClusterSpec) -> tuple[float, ...]:
    return (
        spec.num_nodes, spec.num_workers, spec.cpus_per_worker, spec.gpus_per_worker,
        spec.threads_per_worker,
    )  # fmt: skip


def _per_node(spec: ClusterSpec) -> tuple[int, int]:
    """Cores and GPUs of each machine, of the fullest where they are not alike."""
    workers = math.ceil(spec.num_workers / spec.num_nodes)
    return math.ceil(workers * spec.cpus_per_worker) or 1, workers * int(spec.gpus_per_worker)
