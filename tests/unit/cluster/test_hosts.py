"""Waiting for what a run needs of a Ray's machines, and for machines that were lost."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

from cluster.errors import ClusterError, HostLostError
from cluster.runtime import hosts
from cluster.spec import ClusterSpec

SPEC = ClusterSpec(name="two", num_nodes=2, num_workers=2, cpus_per_worker=4, start_timeout_s=60)


def node(name: str, address: str, is_alive: bool = True) -> dict:
    return {"NodeManagerHostname": name, "NodeManagerAddress": address, "Alive": is_alive}


@pytest.fixture
def ray_has(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what Ray has at each look, the last for ever; a look takes a second of no real time."""

    def say(nodes: list[dict], *num_cpus: int) -> None:
        now_s = iter(range(10**6))
        looks = list(num_cpus)
        monkeypatch.setattr(hosts.time, "monotonic", lambda: next(now_s))
        monkeypatch.setattr(hosts.time, "sleep", lambda _: None)
        monkeypatch.setattr(hosts.ray, "nodes", lambda: nodes)
        monkeypatch.setattr(
            hosts.ray, "cluster_resources",
            lambda: {"CPU": looks.pop(0) if len(looks) > 1 else looks[0]},
        )  # fmt: skip

    return say


def test_hosts_that_came_back_are_not_lost(ray_has) -> None:
    nodes = [node("a", "10.0.0.1"), node("b", "10.0.0.2", False), node("c", "10.0.0.3", False)]
    ray_has([*nodes, node("b", "10.0.0.2")], 8)
    assert hosts.lost_hosts() == ["c (10.0.0.3)"]


def test_nothing_is_said_where_all_is_there(ray_has) -> None:
    said: list[str] = []
    ray_has([node("a", "10.0.0.1"), node("b", "10.0.0.2")], 8)
    hosts.wait_for_hosts(SPEC, said.append)
    assert said == []


def test_host_that_comes_back(ray_has) -> None:
    said: list[str] = []
    ray_has([node("a", "10.0.0.1"), node("b", "10.0.0.2", False)], 4, 4, 4, 8)
    hosts.wait_for_hosts(SPEC, said.append)
    assert said == [
        "b (10.0.0.2): no answer, so Ray has given it up; waiting 60 s (cluster.start_timeout_s) "
        "for it to come back",
        "all of 8 CPU, 0 GPU is there again; the work goes on",
    ]


def test_host_that_stays_away(ray_has) -> None:
    ray_has([node("a", "10.0.0.1"), node("b", "10.0.0.2", False)], 4)
    with pytest.raises(
        HostLostError,
        match=re.escape(
            "b (10.0.0.2): lost, and not back within 60 s (cluster.start_timeout_s); of 8 CPU, "
            "0 GPU Ray has 4 CPU, 0 GPU left; look after that machine and its network, then run "
            "the same command again to continue"
        ),
    ):
        hosts.wait_for_hosts(SPEC, lambda _: None)


def test_too_little_at_the_start(ray_has) -> None:
    ray_has([node("a", "10.0.0.1")], 4)
    with pytest.raises(ClusterError, match=r"two needs 8 CPU, 0 GPU, Ray has 4 CPU, 0 GPU"):
        hosts.wait_for_resources(SPEC, 3)
    ray_has([node("a", "10.0.0.1")], 4, 4, 8)
    hosts.wait_for_resources(dataclasses.replace(SPEC), 30)
