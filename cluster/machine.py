"""What can be known of a run's machines in milliseconds, without Ray."""

from __future__ import annotations

import os
import re
import shlex
import socket
from pathlib import Path
from urllib.parse import urlsplit

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


def way_to(url: str, machine: str = "") -> str:
    """How a person reaches a page of the cluster: its address, an SSH tunnel, or both.

    A tunnel is needed to a page that listens on another machine's loopback alone, and by somebody
    who is on this machine through SSH and whose browser is not.

    Args:
        url: as the page says itself, such as http://127.0.0.1:8265.
        machine: that it is on; '' for this one, or where the address is good from here.
    """
    place = urlsplit(url)
    host = place.hostname or "localhost"
    far = machine if host in ("127.0.0.1", "localhost", "::1") else ""
    # A submitted job has the variable, if at all, from where it was submitted.
    is_local = "TWOFOUR_SUBMITTED" not in os.environ
    login = os.environ.get("SSH_CONNECTION", "").split()[2:3] if is_local else []
    if not far and not login:
        return url
    host = "localhost" if far else f"[{host}]" if ":" in host else host
    through = ["-J", *login, far] if far and login else [far] if far else login
    tunnel = shlex.join(["ssh", "-N", "-L", f"{place.port}:{host}:{place.port}", *through])
    there = place._replace(netloc=f"localhost:{place.port}").geturl()
    shown = f"{tunnel}, then {there}"
    return shown if far else f"{url}; from your own machine: {shown}"


def peak_memory_bytes() -> int:
    """Most memory this process has held since it started (resident set, Linux).

    Not `getrusage`: there a process starts with the peak of the process that started it.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line; peak memory is read on Linux only")
