"""What can be known of a run's machines in milliseconds, without Ray."""

from __future__ import annotations

import os
import re
import socket

from cluster.errors import ClusterError
from cluster.spec import ClusterSpec

_ANSWER_S = 2.0


def require_machine(spec: ClusterSpec, num_gpus: int) -> None:
    """Refuse a cluster that this machine is not, where no Ray is named that may be it and no
    scheduler is asked for the machines.

    Args:
        spec: what the run needs.
        num_gpus: of this machine.

    Raises:
        ClusterError: it needs more machines, or more GPUs; says what to do.
    """
    if spec.kind != "local" or os.environ.get("RAY_ADDRESS"):
        return
    needed = spec.num_workers if spec.uses_gpu else 0
    if spec.num_nodes > 1 or needed > num_gpus:
        what = f"{spec.num_workers} {'GPUs' if spec.uses_gpu else 'CPU workers'}"
        raise ClusterError(
            f"cluster {spec.name} needs {what} on {spec.num_nodes} node(s), RAY_ADDRESS is not set "
            f"and this machine has {num_gpus} GPUs: {spec.description}; start Ray on the machines "
            "and set RAY_ADDRESS, or leave out +cluster to run on this machine"
        )


def require_answer() -> None:
    """Ask whether something listens at the HOST:PORT of RAY_ADDRESS; other forms are not looked at.

    Raises:
        ClusterError: nothing does.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    match = re.fullmatch(r"(?:ray://)?([^/]+):(\d+)", address)
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"RAY_ADDRESS={address}: no Ray answers there ({error}); correct it, start that Ray, "
            "or unset RAY_ADDRESS to run on this machine alone"
        ) from None
