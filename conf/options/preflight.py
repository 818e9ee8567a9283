"""What the job preflight can be told; what is expected of nodes is in `cluster.preflight`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.spec import ClusterSpec
from sparsify.params import check_options, option


@dataclass
class PreflightConfig:
    """Where the nodes meet."""

    out: str = option("runs/preflight", is_path=True)
    """folder on the disk that the run's nodes share, tried by every node; gets the record"""

    def __post_init__(self) -> None:
        check_options(self, "preflight")


@dataclass
class PreflightJobConfig:
    """Check every node of a cluster (job preflight)."""

    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
