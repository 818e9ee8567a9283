"""Sample a dense model's predictions of a token store: once, for many recoveries.

`python -m jobs.teach model.path=MODEL data.train=TOKENS teach.out=FOLDER` writes FOLDER, which
`distill.teacher_cache=FOLDER` of `jobs.distill` then reads in place of the teacher. Interrupted,
the same command goes on at the files that are not finished.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conf.teach import TeachJobConfig


def run(config: TeachJobConfig) -> Path:
    """Write the cache, or what is missing of it; its folder.

    Raises:
        InputError: something the user can put right.
        TwofourError: a file could not be made; finished ones are kept.
    """
    from jobs import _artifact
    from jobs._progress import Display
    from jobs._teach import write_cache
    from jobs.pipeline import ROOT, cluster_errors

    out = Path(config.teach.out).absolute()
    _artifact.prepare_run_dir(out, "teach.out")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_artifact.run_lock(out, "teach.out"))
        display = stack.enter_context(Display())

        def map_shards(work: Any, payloads: list[Any]) -> None:
            from cluster.ray_backend import RayCluster

            cluster = RayCluster(config.cluster, f"teach {out.name}", ROOT, display.on_event)
            with cluster_errors(), cluster:
                cluster.run_tasks("teach", work, payloads, "shards")

        with _artifact.disk_errors(out):
            write_cache(config, out, map_shards, display)
    return out


if __name__ == "__main__":
    from jobs._entry import main

    main("teach")
