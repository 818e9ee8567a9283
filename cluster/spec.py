"""What a run may use of a machine or cluster: a value, checked, without Ray."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

KINDS = tuple(
    sorted(
        path.stem
        for path in (Path(__file__).parent / "kinds").glob("*.py")
        if not path.stem.startswith("_")
    )
)
"""Ways to start work that exist: the modules of `cluster/kinds`, listed without importing."""

_NAME = re.compile(r"[\w.@/+-]+", re.ASCII)
_EXPRESSION = re.compile(r"[\w.,&|*()\[\]:@-]+", re.ASCII)
_LABEL = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.ASCII)
_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}", re.ASCII)
_EXTRA = re.compile(r"--[a-z][a-z-]*(=[^\x00-\x1f\x7f]*)?", re.ASCII)


@dataclass
class SlurmSpec:
    """What to ask of Slurm with cluster.kind=slurm; null leaves it to the site's defaults."""

    account: str | None = None
    """account to charge (sbatch --account)"""
    partition: str | None = None
    """partition, or several with commas"""
    qos: str | None = None
    """quality of service"""
    time: str | None = None
    """time limit as sbatch takes it, such as 24:00:00, 2-12 or 90 (minutes)"""
    constraint: str | None = None
    """features that every node must have"""
    exclude: str | None = None
    """nodes not to use, such as n[03-05],n9"""
    gpu_type: str | None = None
    """name of the GPUs in the site's Slurm, where it has several; their number is the workers'"""
    memory: str | None = None
    """memory per node, such as 900G; 0 = all of it"""
    exclusive: bool = True
    """have the nodes for this job alone; false hides the job's processes from others of its
    nodes (and theirs from it) in a process namespace, which the nodes must allow"""
    max_requeues: int = 20
    """times the job goes back into the queue by itself, after a time limit, preemption or a lost
    node, to carry on from what is saved; 0 = never"""
    max_replacements: int = 2
    """times the job goes back into the queue for other nodes in place of bad ones, which it then
    excludes; each counts as a requeue; 0 = it ends with what is wrong"""
    signal_lead_s: int = 600
    """seconds before the time limit at which to save and stop; must hold a step and a save"""
    interface: str | None = None
    """network interface of the nodes for Ray and the workers, such as ib0; null = the first one"""
    modules: list[str] = dataclasses.field(default_factory=list)
    """modules to load on every node (module load)"""
    setup: str | None = None
    """file that every node sources before anything else, after the modules"""
    container: str | None = None
    """image for `apptainer exec --nv`, with this environment in it; see cluster/images"""
    extra: list[str] = dataclasses.field(default_factory=list)
    """further options of sbatch, such as ["--mail-type=END","--reservation=mine"]"""

    def __post_init__(self) -> None:
        for name, pattern, like in (
            ("account", _NAME, "letters, digits and . _ @ / + -"),
            ("partition", re.compile(r"[\w.,@+-]+", re.ASCII), "names with commas"),
            ("qos", _NAME, "letters, digits and . _ @ / + -"),
            ("gpu_type", _NAME, "letters, digits and . _ @ / + -"),
            ("time", _TIME, "minutes, hours:minutes:seconds or days-hours"),
            ("constraint", _EXPRESSION, "features with & | , ( ) [ ] *, without spaces"),
            ("exclude", _EXPRESSION, "nodes such as n[03-05],n9, without spaces"),
            ("interface", _NAME, "the name of a network interface such as ib0"),
            ("memory", re.compile(r"\d+[KMGT]?", re.ASCII), "a size such as 900G, or 0"),
        ):
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise ValueError(f"cluster.slurm.{name}={value!r}: must be {like}")
        for name in ("modules", "extra"):
            for value in getattr(self, name):
                pattern, like = (
                    (_NAME, "names of modules such as cuda/12.4") if name == "modules" else
                    (_EXTRA, "options of sbatch such as --mail-type=END, on one line")
                )  # fmt: skip
                if not pattern.fullmatch(value):
                    raise ValueError(f"cluster.slurm.{name}: {value!r}: must be {like}")
        for name in ("setup", "container"):
            value = getattr(self, name)
            if value is not None and (not value or not value.isprintable()):
                raise ValueError(f"cluster.slurm.{name}={value!r}: must be a path on one line")
        for name in ("max_requeues", "max_replacements"):
            if getattr(self, name) < 0:
                raise ValueError(f"cluster.slurm.{name}={getattr(self, name)}: must be at least 0")
        if not 1 <= self.signal_lead_s <= 65535:
            raise ValueError(
                f"cluster.slurm.signal_lead_s={self.signal_lead_s}: Slurm takes 1 to 65535"
            )
        limit_s = _seconds(self.time) if self.time else None
        if limit_s is not None and limit_s < self.signal_lead_s + 60:
            raise ValueError(
                f"cluster.slurm.time={self.time}: leaves less than a minute before the signal "
                f"that comes cluster.slurm.signal_lead_s={self.signal_lead_s} s earlier"
            )


@dataclass
class KubeRaySpec:
    """What to ask of Kubernetes with cluster.kind=kuberay."""

    image: str | None = None
    """container image with the project in it (cluster/images/Dockerfile); needed"""
    namespace: str = "default"
    """namespace of the job"""
    claim: str | None = None
    """persistent volume claim with model, text and run.dir, which all pods mount"""
    mount: str = "/shared"
    """path at which pods see the claim"""
    memory: str = "64Gi"
    """memory of each machine's pod"""
    secret: str | None = None
    """Kubernetes secret whose keys become environment variables, such as WANDB_API_KEY"""
    node_selector: list[str] = dataclasses.field(default_factory=list)
    """labels that nodes must have, such as ["gpu=h100"]"""

    def __post_init__(self) -> None:
        for name, pattern, like in (
            ("image", re.compile(r"[\w.:/@-]+", re.ASCII), "an image such as registry/twofour:1"),
            ("namespace", _LABEL, "lower-case letters, digits and dashes"),
            ("claim", _LABEL, "lower-case letters, digits and dashes"),
            ("mount", re.compile(r"/[\w./-]+", re.ASCII), "an absolute path"),
            ("memory", re.compile(r"\d+[KMGT]i?", re.ASCII), "a size such as 64Gi"),
            ("secret", _LABEL, "lower-case letters, digits and dashes"),
        ):
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise ValueError(f"cluster.kuberay.{name}={value!r}: must be {like}")
        for label in self.node_selector:
            if not re.fullmatch(r"[\w./-]+=[\w.-]*", label, re.ASCII):
                raise ValueError(f"cluster.kuberay.node_selector: {label!r}: must be key=value")


@dataclass
class PreflightSpec:
    """What is looked at on every node before the work proper, and what is expected of it."""

    when: str = "auto"
    """auto: at the start of runs that need several machines or GPUs; always; never"""
    min_gpu_share: float = 0.7
    """share of the median GPU's speed that each must have: all wait for the slowest"""
    max_clock_skew_s: float = 5.0
    """seconds that a node's clock may be off the driver's, which time limits are told by"""
    min_write_mb_s: float = 50.0
    """MB/s at which each node should write to the run's folder; less is said, and stops no run"""
    min_read_mb_s: float = 50.0
    """MB/s at which it should read there; less is said, and stops no run"""
    min_free_gb: float = 1.0
    """GB that must be free in the run's folder; what a run needs in all is told by jobs.plan"""
    min_shm_gb: float = 0.1
    """GB that /dev/shm must hold on every node; NCCL fails in a container's default of 0.064"""
    min_all_reduce_gb_s: float | None = None
    """GB/s of bus bandwidth that an all-reduce must reach; null = 5 with GPUs (half of what a
    network of 100 Gbit/s gives), 0.02 with CPUs"""
    timeout_s: float = 120.0
    """seconds that one of its exchanges may take"""

    def __post_init__(self) -> None:
        if self.when not in ("auto", "always", "never"):
            raise ValueError(f"cluster.preflight.when={self.when}: must be auto, always or never")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name != "when" and value is not None and not value >= 0:
                raise ValueError(f"cluster.preflight.{item.name}={value}: must be at least 0")
        if self.min_gpu_share > 1:
            raise ValueError(
                f"cluster.preflight.min_gpu_share={self.min_gpu_share}: must be at most 1"
            )


def _seconds(time: str) -> int:
    """A time limit as Slurm reads it."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return 86400 * int(days) + 3600 * hours + 60 * minutes + seconds
    if len(parts) < 3:  # minutes, or minutes:seconds
        return 60 * parts[0] + sum(parts[1:])
    return 3600 * parts[0] + 60 * parts[1] + parts[2]


@dataclass
class ClusterSpec:
    """Size and limits of the machine or cluster that a run uses."""

    name: str = "local"
    """name shown in records and tables"""
    description: str = "this machine, no GPU needed"
    """what the preset is for and what it needs; shown when it cannot be had"""
    kind: str = "local"
    """how work is started: local (here, by the command itself), or submitted: slurm, ray,
    kuberay, inprocess (docs/clusters.md)"""
    num_nodes: int = 1
    """machines the run needs"""
    num_workers: int = 2
    """worker processes in all (the world size); one per GPU on GPU clusters"""
    cpus_per_worker: float = 1
    """CPU cores reserved per worker"""
    gpus_per_worker: float = 0
    """GPUs reserved per worker; 0 runs on the CPU over gloo, 1 on CUDA over NCCL"""
    threads_per_worker: int = 1
    """threads per worker for CPU maths; more than the cores makes everything slower"""
    max_failures: int = 2
    """restarts after lost workers, without the stage getting any further, before the run stops"""
    start_timeout_s: float = 300.0
    """seconds to wait for the cluster's resources before stopping with what is missing"""
    executor: str = "ray"
    """what runs the workers: ray, or plain: processes of this machine without Ray, for debugging"""
    dashboard: bool = True
    """start the Ray dashboard on a local Ray (127.0.0.1 only)"""
    sweep_jobs: int | None = None
    """runs of a sweep (--multirun) at the same time; null = one after another on this machine, as
    many as find room in Slurm"""
    card: str | None = None
    """GPU by its name in `jobs.plan`, such as h100: a run that it has no room for is refused before
    it starts; null = nobody looks"""
    preflight: PreflightSpec = dataclasses.field(default_factory=PreflightSpec)
    slurm: SlurmSpec = dataclasses.field(default_factory=SlurmSpec)
    kuberay: KubeRaySpec = dataclasses.field(default_factory=KubeRaySpec)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"cluster.kind={self.kind}: no such kind; use {', '.join(KINDS)}")
        for field, low in (
            ("num_nodes", 1), ("num_workers", 1), ("threads_per_worker", 1), ("max_failures", 0),
            ("cpus_per_worker", 0), ("gpus_per_worker", 0), ("start_timeout_s", 1),
        ):  # fmt: skip
            value = getattr(self, field)
            if not value >= low:
                raise ValueError(f"cluster.{field}={value}: must be at least {low}")
        if self.sweep_jobs is not None and self.sweep_jobs < 1:
            raise ValueError(f"cluster.sweep_jobs={self.sweep_jobs}: must be at least 1")
        if self.executor not in ("ray", "plain"):
            raise ValueError(f"cluster.executor={self.executor}: must be ray or plain")
        if self.gpus_per_worker not in (0, 1):
            raise ValueError(
                f"cluster.gpus_per_worker={self.gpus_per_worker}: a worker drives one GPU or none; "
                "use 0 or 1 and set cluster.num_workers to the number of GPUs"
            )

    @property
    def workers_per_node(self) -> int:
        """Workers on each machine where all have as many.

        Raises:
            ValueError: they cannot.
        """
        if self.num_workers % self.num_nodes:
            raise ValueError(
                f"cluster.num_workers={self.num_workers}: does not divide into "
                f"cluster.num_nodes={self.num_nodes} machines; use a multiple of it"
            )
        return self.num_workers // self.num_nodes

    @property
    def uses_gpu(self) -> bool:
        """Whether workers run on CUDA."""
        return self.gpus_per_worker > 0
