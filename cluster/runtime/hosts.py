"""What a run needs of a Ray's machines: waiting until it is there, and which of them are gone."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray

from cluster.errors import ClusterError, HostLostError
from cluster.spec import ClusterSpec

_LOOK_EVERY_S = 1.0


def lost_hosts() -> list[str]:
    """Machines that Ray has given up, `name (address)` each; those that came back are not."""
    nodes = ray.nodes()
    alive = {node["NodeManagerAddress"] for node in nodes if node["Alive"]}
    gone = {node["NodeManagerAddress"]: node["NodeManagerHostname"] for node in nodes}
    return [f"{name} ({address})" for address, name in gone.items() if address not in alive]


def wait_for_resources(spec: ClusterSpec, wait_s: float) -> None:
    """Wait until the Ray has what the workers need, before the first work.

    Raises:
        ClusterError: it has not within `wait_s`.
    """
    if (there := _wait(spec, wait_s)) is not None:
        raise ClusterError(
            f"cluster {spec.name} needs {_words(_wanted(spec))}, Ray has {there} "
            f"({spec.description}); set RAY_ADDRESS to a larger Ray, or choose another +cluster="
        )


def wait_for_hosts(spec: ClusterSpec, say: Callable[[str], None]) -> None:
    """Wait until machines that were lost are back, or others for them, before the next work.

    Args:
        spec: of the run.
        say: called with one line if there is something to wait for.

    Raises:
        HostLostError: what the workers need is not there within `spec.start_timeout_s`.
    """
    if _wait(spec, 0) is None:
        return
    hosts = ", ".join(lost_hosts()) or "a machine"
    say(
        f"{hosts}: no answer, so Ray has given it up; waiting {spec.start_timeout_s:g} s "
        "(cluster.start_timeout_s) for it to come back"
    )
    if (there := _wait(spec, spec.start_timeout_s)) is None:
        say(f"all of {_words(_wanted(spec))} is there again; the work goes on")
        return
    raise HostLostError(
        f"{', '.join(lost_hosts()) or hosts}: lost, and not back within {spec.start_timeout_s:g} s "
        f"(cluster.start_timeout_s); of {_words(_wanted(spec))} Ray has {there} left; look after "
        "that machine and its network, then run the same command again to continue"
    )


def _wait(spec: ClusterSpec, wait_s: float) -> str | None:
    """None once the Ray has what is needed; what it has if that is not so for `wait_s`."""
    deadline_s = time.monotonic() + wait_s
    wanted = _wanted(spec)
    while True:
        have = ray.cluster_resources()
        if all(have.get(kind, 0) >= amount for kind, amount in wanted.items()):
            return None
        if time.monotonic() >= deadline_s:
            return _words({kind: have.get(kind, 0) for kind in wanted})
        time.sleep(_LOOK_EVERY_S)


def _wanted(spec: ClusterSpec) -> dict[str, float]:
    return {
        "CPU": spec.num_workers * spec.cpus_per_worker,
        "GPU": spec.num_workers * spec.gpus_per_worker,
    }


def _words(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in amounts.items())
