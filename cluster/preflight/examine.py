"""The preflight on the workers, its verdict on the driver, and the table.

A new check is one more file like `clocks.py` and one more entry of `CHECKS`.
Importing this costs milliseconds; the checks are imported when they are made: some cost torch.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.executor import Executor
from cluster.preflight.check import DRIVER, UNKNOWN, Check, Finding, Place, Report
from cluster.runtime.worker import WorkerContext
from cluster.spec import ClusterSpec

CHECKS = ("gpus", "versions", "clocks", "storage", "arithmetic", "network")
"""Modules of this package, in this order; one may ask what those before it have found."""

NAME = "preflight"


def checks() -> list[Check]:
    """All of them, imported."""
    return [_part(name).CHECK for name in CHECKS]


def _part(name: str) -> Any:
    return importlib.import_module(f"cluster.preflight.{name}")


def examine(executor: Executor, spec: ClusterSpec, folder: Path) -> Report:
    """Have all workers take all checks.

    Args:
        executor: entered.
        spec: of its cluster.
        folder: of the run, for files that are removed again; exists.

    Raises:
        WorkFailedError, ClusterLostError: the workers cannot be had.
    """
    probe, train = folder / f".{NAME}-{secrets.token_hex(4)}", folder / f".{NAME}-train"
    token = secrets.token_hex(16)
    probe.mkdir()
    try:
        with (probe / DRIVER).open("w", encoding="utf-8") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        found = executor.run_workers(NAME, _on_worker, (spec, str(probe), token), train)
    finally:
        for path in (probe, train):
            shutil.rmtree(path, ignore_errors=True)
    return Report(spec, found["hosts"], found["facts"])


def _on_worker(context: WorkerContext, payload: tuple[ClusterSpec, str, str]) -> dict[str, Any]:
    """Take all checks, each together with all other workers."""
    spec, folder, token = payload
    with _part("gather").gathering(spec.preflight.timeout_s) as gather:
        place = Place(context, spec, Path(folder), token, gather(node_name()))
        for number, check in enumerate(checks()):
            context.progress(number, len(CHECKS), f"checks of every node, {check.name}")
            is_asked = check.on_every_rank or context.rank in place.leaders
            heard: list[Any] = []
            for step in check.steps:
                heard = gather(_taken(step, place, heard) if is_asked else None)
            place.facts[check.name] = heard
        context.progress(len(CHECKS), len(CHECKS), "checks of every node")
    return {"hosts": place.hosts, "facts": place.facts}


def node_name() -> str:
    """What Slurm calls this node, or else its own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _taken(step: Callable[[Place, list[Any]], Any], place: Place, heard: list[Any]) -> Any:
    """What a step returns, or as a fact what it raised: the other workers wait for an answer."""
    before = heard[place.rank] if heard else None
    if before and "error" in before:
        return before
    try:
        return step(place, heard)
    except Exception as error:  # whatever it is, it is this node's fact
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def judge(report: Report) -> list[Finding]:
    """Everything that is wrong, what is bad first."""
    found: list[Finding] = []
    for check in checks():
        for rank, fact in enumerate(report.facts[check.name]):
            if fact and "error" in fact:
                what = f"worker {rank}: the check of {check.name} failed with {fact['error']}"
                fix = "mend it, or skip all checks with cluster.preflight.when=never"
                found.append(Finding(report.hosts[rank], what, fix))
        found += check.judge(report)
    return sorted(found, key=lambda finding: not finding.is_bad)


def table(report: Report) -> list[str]:
    """One line a node, of what its first rank found, under a line of titles.

    Columns in which nothing is known of any node are left out.
    """
    cells: dict[str, dict[str, str]] = {}
    for check in checks():
        facts = report.by_node(check.name)
        for title, cell in check.columns.items():
            cells[title] = {n: cell(facts[n]) if n in facts else "failed" for n in report.nodes}
            if not any(report.facts[check.name]):
                cells[title] = dict.fromkeys(report.nodes, UNKNOWN)
    shown = {t: column for t, column in cells.items() if set(column.values()) != {UNKNOWN}}
    counts = {node: str(report.hosts.count(node)) for node in report.nodes}
    columns = {"NODE": {n: n for n in report.nodes}, "WORKERS": counts, **shown}
    rows = [list(columns), *([column[n] for column in columns.values()] for n in report.nodes)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def record(report: Report, findings: list[Finding], taken_s: float) -> dict[str, Any]:
    """All of it as plain values, for JSON."""
    return {
        "schema": 1,
        "cluster": report.spec.name,
        "taken_s": taken_s,
        "nodes": report.nodes,
        "hosts": report.hosts,
        "facts": report.facts,
        "findings": [
            {"node": f.node, "fact": f.fact, "fix": f.fix, "is_bad": f.is_bad} for f in findings
        ],
    }
