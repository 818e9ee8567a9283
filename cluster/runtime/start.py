"""Starting a Ray on this machine, or joining the one of RAY_ADDRESS.

Before one is joined it is asked, within seconds, whether it is there and lets the run in: Ray
itself would try for a quarter of an hour, and not say that it is a token that is missing.
"""

from __future__ import annotations

import math
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

import grpc
import ray
from ray import _raylet
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from cluster.errors import ClusterError
from cluster.spec import ClusterSpec

_ENVIRONMENT = {
    # Workers do the run's work: at Ray's own niceness of 15 any other process starves them.
    "RAY_worker_niceness": "0",
    # Usage reports would go to the network.
    "RAY_USAGE_STATS_ENABLED": "0",
    # The dashboard's Train page.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # A worker that was given no GPU sees none, so that no library picks one by itself.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # glibc would keep freed activations between those that wait in pruning: twice the memory.
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
}

_OF_WORKERS = ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "MALLOC_MMAP_THRESHOLD_")
"""of these, what a worker's own process reads; the others are the raylet's and the head's"""

_NOT_SHIPPED = ("/.git", "/.venv", "/runs", "/tests", "/docs", "/.mypy_cache", "/.ruff_cache")

_WAIT_S = 10.0

_CALL_S = 5.0

_WAY_OUT = "correct it, start that Ray, or unset RAY_ADDRESS to run on this machine alone"


def start_ray(spec: ClusterSpec, run_name: str, root: Path, address: str | None) -> Any:
    """Start Ray, or join the one of an address; what `ray.init` returns.

    Args:
        spec: size of one that is started.
        run_name: shown in the dashboard.
        root: folder with the project's packages; shipped to a Ray that is joined.
        address: of RAY_ADDRESS, None starts one here.

    Raises:
        ClusterError: it cannot be reached or started.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {
        # A new one each time: the actors of a Ray that was just left may still have their names.
        "namespace": f"twofour-{uuid.uuid4().hex[:12]}",
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": True,
        "job_config": ray.job_config.JobConfig(metadata={"job_name": run_name}),
    }
    if address:
        options["runtime_env"] = {
            "working_dir": str(root),
            "excludes": list(_NOT_SHIPPED),
            # That Ray was started elsewhere, and its workers have none of this environment.
            "env_vars": {key: os.environ[key] for key in _OF_WORKERS},
        }
        options["address"] = address
    else:
        cores = os.cpu_count() or 1
        options["address"] = "local"
        options["num_cpus"] = max(cores, math.ceil(spec.num_workers * spec.cpus_per_worker))
        # Ray Train watches its controller through the dashboard's state API, so the dashboard
        # process runs in any case; the option only decides what we advertise.
        options["include_dashboard"] = True
        options["dashboard_host"] = "127.0.0.1"
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(root), os.environ.get("PYTHONPATH")])
        )
    try:
        return ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"at RAY_ADDRESS={address}" if address else "on this machine"
        first = (str(error) or repr(error)).strip().splitlines()[0]
        raise ClusterError(f"Ray cannot be reached or started {where}: {first}") from None


def check_this_machine(spec: ClusterSpec) -> None:
    """A local Ray has this machine's GPUs and no more: say so before anything starts.

    Raises:
        ClusterError: the spec needs several machines.
    """
    if spec.num_nodes > 1:
        per_node = "GPUs" if spec.uses_gpu else "CPU workers"
        raise ClusterError(
            f"cluster {spec.name} needs {spec.num_workers} {per_node} on {spec.num_nodes} "
            f"node(s), and RAY_ADDRESS is not set: {spec.description}; start Ray on the machines "
            "and set RAY_ADDRESS, or leave out +cluster to run on this machine"
        )


def check_address(address: str, wait_s: float = _WAIT_S) -> None:
    """Ask the Ray of an address HOST:PORT whether it is alive; other forms are Ray's to judge.

    Args:
        address: of RAY_ADDRESS.
        wait_s: for one that has just been started.

    Raises:
        ClusterError: nothing answers, it asks for another token, or it is of another version.
    """
    uses_tls = os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")
    if not re.fullmatch(r"[^/]+:\d+", address) or uses_tls:
        return
    deadline_s = time.monotonic() + wait_s
    while (error := _error(address)) is not None:
        code = error.code()
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise ClusterError(f"RAY_ADDRESS={address}: {_token_words()}")
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise ClusterError(f"RAY_ADDRESS={address}: is no Ray ({code.name}); {_WAY_OUT}")
        if time.monotonic() >= deadline_s:
            raise ClusterError(f"RAY_ADDRESS={address}: no Ray answers there; {_WAY_OUT}")
        time.sleep(1.0)


def _error(address: str) -> grpc.RpcError | None:
    """What the Ray's answer to a call is instead of yes."""
    messages: Any = gcs_service_pb2
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            reply = stub.CheckAlive(
                messages.CheckAliveRequest(), timeout=_CALL_S, metadata=_token()
            )
        except grpc.RpcError as error:
            return error
    if reply.ray_version != ray.__version__:
        raise ClusterError(
            f"RAY_ADDRESS={address}: is Ray {reply.ray_version}, this one is {ray.__version__}; "
            "install the same on all machines (make setup)"
        )
    return None


def _sends_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _token() -> list[tuple[str, str]]:
    """What Ray sends with each call."""
    if not _sends_token():
        return []
    raylet: Any = _raylet
    header = raylet.AuthenticationTokenLoader.instance().get_token_for_http_header()
    return [(name.lower(), value) for name, value in header.items()]


def _token_words() -> str:
    where = "in ~/.ray/auth_token or RAY_AUTH_TOKEN; `ray get-auth-token` prints it on its machine"
    if _sends_token():
        return f"this Ray asks for another token than the one that is here, {where}"
    return f"this Ray asks for a token; set RAY_AUTH_MODE=token, and have its token {where}"
