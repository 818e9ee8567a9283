"""Independent calls by Ray Data: many small pieces of work, streamed through a few workers.

A part of cluster/ray_backend.py in a file of its own, because importing Ray Data takes seconds
that other work need not wait for. `map_shards` is for work whose results are files and a few
figures; work that needs GPUs, or workers that speak with each other, is the backend's.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
import ray.data

from cluster.ray_backend import RayCluster
from cluster.ray_worker import Work, WorkerContext, guarded


def map_shards(
    cluster: RayCluster, name: str, work: Work, payloads: Sequence[Any], what: str
) -> list[Any]:
    """Run `work(context, payload)` for each payload, at most one per worker of the spec at a time.

    A call whose worker dies is made again, up to `spec.max_failures` times. Ray Data itself would
    do so for ever, which is why calls are counted here.

    Args:
        cluster: entered.
        name: for the dashboard and the progress.
        work: a module-level function that returns plain JSON values.
        payloads: one per call; at least one.
        what: the unit that the progress counts, in the plural.

    Returns:
        The results in the order of the payloads.

    Raises:
        WorkFailedError: a call raised, or its worker kept dying.
    """
    spec, board = cluster.spec, cluster.cleared_board()
    attempts: Any = _Attempts.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    log_folder = cluster.log_folder

    def call(row: dict[str, Any]) -> dict[str, Any]:
        context = WorkerContext(board, name, 0, 1, spec)
        lost = ray.get(attempts.begin.remote(row["index"]))
        if lost > spec.max_failures:
            text = f"{name}: workers kept dying, {lost} times at one of the {what}"
            ray.get(board.fail.remote("WorkerLost", f"{text}; see {log_folder}", ""))
            raise RuntimeError(text)
        if lost:
            context.warn(f"{name}: a worker was lost; doing its part again")
        result = guarded(context, work, payloads[row["index"]])
        return {"index": row["index"], "result": json.dumps(result)}

    _quiet()
    items = [{"index": index} for index in range(len(payloads))]
    # One block per payload: a block is what Ray Data hands to a task, and what it does again.
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        call,
        compute=ray.data.TaskPoolStrategy(size=min(spec.num_workers, len(payloads))),
        num_cpus=spec.cpus_per_worker,
    )
    results: list[Any] = [None] * len(payloads)
    done = 0
    with cluster.watch():
        try:
            for row in dataset.iter_rows():
                results[row["index"]] = json.loads(row["result"])
                done += 1
                cluster.tell_done(name, done, len(payloads), what)
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise cluster.failure_behind(name, error) from None
    return results


@ray.remote
class _Attempts:
    """How often each call was begun."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, index: int) -> int:
        """Note one more attempt; how many there were before, all of them lost."""
        self._begun[index] += 1
        return self._begun[index] - 1


def _quiet() -> None:
    """The run has its own progress; Ray Data's goes to the log files and the dashboard."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
