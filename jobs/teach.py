"""Sample a dense model's predictions of a token store: once, for many recoveries.

`python -m jobs.teach model.path=MODEL data.train=TOKENS teach.out=FOLDER` writes FOLDER, which
`distill.teacher_cache=FOLDER` of `jobs.distill` then reads in place of the teacher. Interrupted,
the same command resumes at the files that are not finished.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from conf.options.teach import TeachJobConfig
from jobs.cli.command import Command
from jobs.cli.main import main


def run(config: TeachJobConfig) -> Path:
    """Write the cache, or what is missing of it; its folder.

    Raises:
        InputError: something the user can put right.
        TwofourError: a file could not be made; finished ones are kept.
    """
    from jobs.runs import folder
    from jobs.runs.display import Display
    from jobs.runs.session import ROOT, cluster_errors
    from jobs.workers.teach import write_cache

    out = Path(config.teach.out).absolute()
    folder.prepare_run_dir(out, "teach.out")
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.run_lock(out, "teach.out"))
        display = stack.enter_context(Display())

        def map_shards(work: Any, payloads: list[Any]) -> None:
            from cluster.runtime.backend import RayCluster

            cluster = RayCluster(config.cluster, f"teach {out.name}", ROOT, display.on_event)
            with cluster_errors(), cluster:
                cluster.run_tasks("teach", work, payloads, "shards")

        with folder.disk_errors(out):
            write_cache(config, out, map_shards, display)
    return out


def describe_plan(config: TeachJobConfig) -> list[str]:
    """What `run` would do, in lines for a person; reads the store's manifest and the model's."""
    from jobs.workers import teach

    return teach.describe_plan(config)


COMMAND = Command(
    "teach", TeachJobConfig, run, describe_plan,
    summary="Sample a dense model's predictions of a token store, once for many recoveries.",
    examples=(
        "teach.out=runs/teacher model.path=/models/8b data.train=/data/tokens",
        "data.train=/data/tokens teach.num_samples=64 --dry-run",
    ),
    uses=("model.path", "model.dtype", "data.train", "data.isolate_documents", "teach", "cluster"),
    needs="data.train=PATH",
    out="teach.out",
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
