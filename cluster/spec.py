"""What a run may use of a machine or cluster: a value, checked, without Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ClusterSpec:
    """Size and limits of the machine or cluster that a run uses."""

    name: str = "local"
    """name shown in records and tables"""
    description: str = "this machine, no GPU needed"
    """what the preset is for and what it needs; shown when it cannot be had"""
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
    card: str | None = None
    """GPU by its name in `jobs.plan`, such as h100: a run that it has no room for is refused before
    it starts; null = nobody looks"""

    def __post_init__(self) -> None:
        for field, low in (
            ("num_nodes", 1), ("num_workers", 1), ("threads_per_worker", 1), ("max_failures", 0),
            ("cpus_per_worker", 0), ("gpus_per_worker", 0), ("start_timeout_s", 1),
        ):  # fmt: skip
            value = getattr(self, field)
            if not value >= low:
                raise ValueError(f"cluster.{field}={value}: must be at least {low}")
        if self.executor not in ("ray", "plain"):
            raise ValueError(f"cluster.executor={self.executor}: must be ray or plain")
        if self.gpus_per_worker not in (0, 1):
            raise ValueError(
                f"cluster.gpus_per_worker={self.gpus_per_worker}: a worker drives one GPU or none; "
                "use 0 or 1 and set cluster.num_workers to the number of GPUs"
            )

    @property
    def uses_gpu(self) -> bool:
        """Whether workers run on CUDA."""
        return self.gpus_per_worker > 0
