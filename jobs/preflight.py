"""Check every node of a cluster before hours are spent on it: GPUs, network, disk, versions.

`python -m jobs.preflight +cluster=NAME` does alone what a run on several machines or on GPUs begins
with (cluster.preflight.when): prints a table with a line for each node, and what is bad or odd.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from conf.options.preflight import PreflightJobConfig
from jobs.cli.command import Command
from jobs.cli.main import main
from jobs.runs.display import Display
from jobs.runs.folder import prepare_run_dir, run_lock
from jobs.runs.preflight import RECORD, preflight
from jobs.runs.session import cluster_errors, new_cluster


def run(config: PreflightJobConfig) -> Path:
    """Check all nodes; the record's file.

    Raises:
        InputError: something is bad; the first of it in one line.
    """
    folder, option = Path(config.preflight.out).absolute(), "preflight.out"
    prepare_run_dir(folder, option)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_lock(folder, option))
        display = stack.enter_context(Display())
        stack.enter_context(cluster_errors())
        display.start_stage("preflight")
        cluster = new_cluster(config.cluster, f"preflight {folder.name}", display.on_event)
        executor = stack.enter_context(cluster)
        for text in preflight(executor, config.cluster, folder, display.say, replace=False):
            display.on_event({"kind": "warning", "text": text})
    return folder / ".cluster" / RECORD


def describe_plan(config: PreflightJobConfig) -> list[str]:
    """What `run` would do, in lines for a person; touches nothing."""
    spec = config.cluster
    return [
        f"preflight: {spec.num_workers} workers on {spec.num_nodes} node(s) of {spec.name}",
        f"  folder that they share: {config.preflight.out}",
    ]


COMMAND = Command(
    "preflight", PreflightJobConfig, run, describe_plan,
    summary=__doc__,
    examples=(
        "cluster.num_workers=2",
        "+cluster=h100x32 preflight.out=/shared/preflight",
        "+cluster=slurm-h100x32 preflight.out=/shared/preflight --dry-run",
    ),
    uses=("preflight", "cluster"),
    out="preflight.out",
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
