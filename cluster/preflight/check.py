"""What a check is: steps that all workers take at once, a verdict on what they found, columns."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.runtime.worker import WorkerContext
from cluster.spec import ClusterSpec, PreflightSpec

DRIVER = "driver"
"""name of the driver's file in the folder that all nodes should share"""

UNKNOWN = "-"
"""in the table: nobody could or would find out"""


@dataclass(frozen=True)
class Place:
    """A worker, as the steps of checks see it."""

    context: WorkerContext
    spec: ClusterSpec
    folder: Path
    """of the preflight alone, in the run's folder; may be missing on a node that does not share"""
    token: str
    """what is in the driver's file there, and at the start of every node's"""
    hosts: list[str]
    """name of the node of each rank"""
    facts: dict[str, list[Any]] = field(default_factory=dict)
    """what the checks before this one have found, by rank"""

    @property
    def rank(self) -> int:
        """Of this worker."""
        return self.context.rank

    @property
    def leaders(self) -> list[int]:
        """The first rank of each node."""
        return [rank for rank, host in enumerate(self.hosts) if self.hosts.index(host) == rank]


Step = Callable[[Place, list[Any]], Any]
"""gets what every rank returned in the step before; returns plain values"""


@dataclass(frozen=True)
class Finding:
    """Something wrong: with one node, or, where `node` is '', with none in particular."""

    node: str
    fact: str
    """what was found and what was expected"""
    fix: str
    """what to do"""
    is_bad: bool = True
    """whether the run must not start; else it is odd, and said"""

    def line(self) -> str:
        """On one line."""
        return f"{self.node}: {self.fact}; {self.fix}" if self.node else f"{self.fact}; {self.fix}"


@dataclass(frozen=True)
class Report:
    """What all workers found."""

    spec: ClusterSpec
    hosts: list[str]
    """name of the node of each rank"""
    facts: dict[str, list[Any]]
    """by check, then by rank; None from ranks that were not asked, `error` in what failed"""

    @property
    def limits(self) -> PreflightSpec:
        """What is expected."""
        return self.spec.preflight

    @property
    def nodes(self) -> list[str]:
        """Each once, in the order of their first ranks."""
        return list(dict.fromkeys(self.hosts))

    def by_node(self, check: str) -> dict[str, Any]:
        """What the first rank of each node found, of those that found something."""
        found = {node: self.facts[check][self.hosts.index(node)] for node in self.nodes}
        return {node: fact for node, fact in found.items() if fact and "error" not in fact}

    def by_rank(self, check: str) -> dict[int, Any]:
        """What each rank found, of those that found something."""
        facts = enumerate(self.facts[check])
        return {rank: fact for rank, fact in facts if fact and "error" not in fact}


@dataclass(frozen=True)
class Check:
    """One thing that is looked at."""

    name: str
    steps: tuple[Step, ...]
    """what the last one returns is the fact"""
    judge: Callable[[Report], Iterable[Finding]]
    columns: dict[str, Callable[[Any], str]]
    """title -> cell of the table, from the fact of a node's first rank"""
    on_every_rank: bool = False
    """else the first rank of each node takes the steps, and the others wait"""


def odd_ones(values: dict[str, Any]) -> tuple[Any, list[str]]:
    """What most nodes have, the first one's among equals, and the nodes with something else."""
    counts = Counter(values.values())
    most = max(counts.values(), default=0)
    usual = next((value for value in values.values() if counts[value] == most), None)
    return usual, [node for node, value in values.items() if value != usual]


def slow_ones(speeds: dict[Any, float], share: float) -> tuple[float, list[Any]]:
    """The median speed, and whose speed is below that share of it."""
    if not speeds:
        return 0.0, []
    median = statistics.median(speeds.values())
    return median, [key for key, speed in speeds.items() if speed < share * median]
