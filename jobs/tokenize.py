"""Turn training text into a store of token rows: once, in parallel, for many recoveries.

`python -m jobs.tokenize model.path=MODEL data.train=TEXT tokenize.out=FOLDER` writes FOLDER, which
`data.train=FOLDER` of `jobs.distill` then reads. Interrupted, the same command goes on at the
shards that are not finished.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conf.tokenize import TokenizeJobConfig


def run(config: TokenizeJobConfig) -> Path:
    """Write the store, or what is missing of it; its folder.

    Raises:
        InputError: something the user can put right.
        TwofourError: a shard could not be made; finished ones are kept.
    """
    from jobs import _artifact
    from jobs._progress import Display
    from jobs._tokenize import write_store
    from jobs.pipeline import ROOT, cluster_errors

    out = Path(config.tokenize.out).absolute()
    _artifact.prepare_run_dir(out, "tokenize.out")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_artifact.run_lock(out, "tokenize.out"))
        display = stack.enter_context(Display())

        def map_shards(work: Any, payloads: list[Any]) -> None:
            from cluster.ray_backend import RayCluster
            from cluster.ray_data import map_shards as map_by_ray

            name = f"tokenize {out.name}"
            cluster = RayCluster(config.cluster, name, ROOT, display.on_event)
            with cluster_errors(), cluster:
                map_by_ray(cluster, "tokenize", work, payloads, "shards")

        with _artifact.disk_errors(out):
            write_store(config, out, map_shards, display)
    return out


if __name__ == "__main__":
    from jobs._entry import main

    main("tokenize")
