"""The preflight of a run: every node is looked at before the work, and a bad one is done without.

What the checks are and how they are judged is in cluster/preflight; here is when they are made,
what becomes of their verdict, and where it is on record.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cluster.executor import Executor
from cluster.preflight.examine import examine, judge, record, table
from cluster.spec import ClusterSpec
from jobs.runs.folder import write_json, write_text
from sparsify.errors import InputError

RECORD = "preflight.json"
"""in RUN/.cluster: what was found, in full"""

BAD_NODES = "bad-nodes"
"""in RUN/.cluster: a node a line, for the batch script of Slurm, which can ask for others"""

SKIPPING = "cluster.preflight.when=never skips it"


def is_due(spec: ClusterSpec) -> bool:
    """Whether a run begins with it: it takes some seconds, which one machine's CPUs do not need."""
    if spec.preflight.when == "auto":
        return spec.num_nodes > 1 or spec.uses_gpu
    return spec.preflight.when == "always"


def preflight(
    executor: Executor, spec: ClusterSpec, run_dir: Path, say: Callable[[str], None],
    replace: bool = True,
) -> list[str]:  # fmt: skip
    """Have every node checked; where that can be done, go on without bad ones.

    Args:
        executor: entered.
        spec: of its cluster.
        run_dir: of the run.
        say: shows a line to the user.
        replace: whether to look for nodes in place of bad ones, here or, by the name that is left
            in a file, in the batch script of a job.

    Returns:
        What is odd and stops no run, a line each.

    Raises:
        InputError: something is bad; the first of it in one line.
        WorkFailedError, ClusterLostError: the workers cannot be had.
    """
    folder = run_dir / ".cluster"
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / BAD_NODES).unlink(missing_ok=True)
    while True:
        skipping = f"; {SKIPPING}" if replace else ""
        say(f"preflight: checking every node, {spec.num_workers} workers{skipping}")
        begun_s = time.monotonic()
        report = examine(executor, spec, run_dir)
        findings, taken_s = judge(report), time.monotonic() - begun_s
        write_json(folder / RECORD, record(report, findings, taken_s))
        for line in table(report):
            say(f"  {line}")
        bad = [finding for finding in findings if finding.is_bad]
        for finding in bad[1:]:
            say(f"bad: {finding.line()}")
        odd = [f"preflight: {finding.line()}" for finding in findings if not finding.is_bad]
        if not bad:
            say(f"preflight: {len(report.nodes)} node(s) are fit, in {taken_s:.1f} s")
            return odd
        nodes = sorted({finding.node for finding in bad if finding.node})
        if not (replace and nodes and executor.exclude(nodes)):
            break
        say(f"bad: {bad[0].line()}")
        say(f"preflight: going on without {', '.join(nodes)}")
    for text in odd:
        say(text)
    if replace and nodes:
        write_text(folder / BAD_NODES, "".join(f"{node}\n" for node in nodes))
    more = f" ({len(bad) - 1} more above)" if len(bad) > 1 else ""
    raise InputError(f"preflight: {bad[0].line()}{more}")
