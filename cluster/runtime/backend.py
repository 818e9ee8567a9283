"""Which failures are worth another try: the memory of a driver that restarts its workers.

A lost machine deserves a restart. The same exception at the same step does not: it will come again,
and every further try costs the time since the last checkpoint.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterError, WorkFailedError
from cluster.runtime.board import OnProgress, Watch
from cluster.runtime.worker import Board, Work, WorkerContext, guarded, is_peer_loss
from cluster.spec import ClusterSpec

# What differs between two tries that failed alike: addresses in memory, ports and process ids.
_VOLATILE = re.compile(r"0x[0-9a-fA-F]+|\bpid[ =:]*\d+|(?<=:)\d{4,5}\b|\bid [0-9a-f]{8,}\b")

_MOST_KEPT = 50


@dataclass(frozen=True)
class Decision:
    """Whether to start again, and why or why not."""

    retry: bool
    reason: str


class FailureLog:
    """Decides after each failure of a run, and carries its memory over restarts of the driver.

    Two budgets. A failure of the machines (a worker lost, a hang) is retried `max_retries` times,
    counted anew whenever the run has got further than it had at any failure before. An exception of
    the work itself is retried once, since it may be a passing fault of a machine too; the same one
    at the same step a second time, or one at all that only the user can mend, is final.

    Args:
        max_retries: tries without progress, at least 0.
    """

    def __init__(self, max_retries: int) -> None:
        if max_retries < 0:
            raise ValueError(f"max_retries={max_retries}: must be at least 0")
        self.max_retries = max_retries
        self._failures: list[dict[str, Any]] = []
        self._num_without_progress = 0
        self._furthest_step = -1

    def record(
        self,
        kind: str,
        message: str,
        step: int | None,
        is_infrastructure: bool,
        is_users: bool = False,
    ) -> Decision:
        """Note a failure and decide.

        Args:
            kind: class of the exception, or a word for what was lost.
            message: its text; addresses, ports and process ids in it do not count.
            step: last step that was committed (of the checkpoint, or of the step it happened in,
                but always the same of the two); None before the first.
            is_infrastructure: the machines failed, not the work.
            is_users: only another config or input can mend it.
        """
        text = _VOLATILE.sub("*", message)
        failure = {"kind": kind, "message": text, "step": step}
        at = "before the first step" if step is None else f"at step {step}"
        is_known = not is_infrastructure and failure in self._failures
        self._failures = [*self._failures, failure][-_MOST_KEPT:]
        if is_users:
            return Decision(False, f"{kind} is for the user to mend; not retried")
        if is_known:
            return Decision(
                False, f"the same {kind} {at} for the second time: it would come again; not retried"
            )
        reached = -1 if step is None else step
        if reached > self._furthest_step:
            self._furthest_step, self._num_without_progress = reached, 0
        self._num_without_progress += 1
        if self._num_without_progress > self.max_retries:
            return Decision(
                False,
                f"{self._num_without_progress} failures without progress since "
                f"{'the start' if self._furthest_step < 0 else f'step {self._furthest_step}'}, "
                f"{self.max_retries} retries are allowed; not retried",
            )
        left = self.max_retries - self._num_without_progress
        return Decision(True, f"{kind} {at}; retried, {left} more without progress")

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a file beside the checkpoints."""
        return {
            "failures": self._failures,
            "num_without_progress": self._num_without_progress,
            "furthest_step": self._furthest_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._failures = list(state["failures"])
        self._num_without_progress = state["num_without_progress"]
        self._furthest_step = state["furthest_step"]


_ENVIRONMENT = {
    # Workers do the run's work: at Ray's own niceness of 15 any other process starves them.
    "RAY_worker_niceness": "0",
    # Usage reports would go to the network.
    "RAY_USAGE_STATS_ENABLED": "0",
    # The dashboard's Train page.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # A worker that was given no GPU sees none, so that no library picks one by itself.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # glibc would keep freed activations between those that wait in pruning: twice the memory.
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
}


def _train_loop(loop_config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    place = ray.train.get_context()
    context = WorkerContext(
        loop_config["board"], loop_config["name"], place.get_world_rank(),
        place.get_world_size(), loop_config["spec"], place.get_local_world_size(),
    )  # fmt: skip
    guarded(context, loop_config["work"], loop_config["payload"])


def _task(board: Any, name: str, spec: ClusterSpec, work: Work, payload: Any) -> Any:
    return guarded(WorkerContext(board, name, 0, 1, spec), work, payload)


class RayCluster:
    """A started or joined Ray, used as a context manager by one run.

    Args:
        spec: size and limits.
        run_name: shown in the dashboard.
        root: folder with the project's packages; shipped to a cluster in RAY_ADDRESS.
        on_event: called on a background thread with every event of the board.
    """

    def __init__(self, spec: ClusterSpec, run_name: str, root: Path, on_event: OnProgress) -> None:
        self.spec = spec
        self.run_name = run_name
        self.dashboard_url: str | None = None
        self._root = root
        self._on_event = on_event
        self._board: Any = None

    def __enter__(self) -> RayCluster:
        """Start Ray, or join the one in RAY_ADDRESS, and wait for what the spec needs."""
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {
            "namespace": f"twofour-{os.getpid()}",
            "log_to_driver": False,
            "logging_level": "ERROR",
            "configure_logging": True,
            "job_config": ray.job_config.JobConfig(metadata={"job_name": self.run_name}),
        }
        if address:
            excludes = [
                "/.git",
                "/.venv",
                "/runs",
                "/tests",
                "/docs",
                "/.mypy_cache",
                "/.ruff_cache",
            ]
            options["runtime_env"] = {"working_dir": str(self._root), "excludes": excludes}
            options["address"] = address
        else:
            self._check_this_machine()
            cores = os.cpu_count() or 1
            needed = math.ceil(self.spec.num_workers * self.spec.cpus_per_worker)
            options["address"] = "local"
            options["num_cpus"] = max(cores, needed)
            # Ray Train watches its controller through the dashboard's state API, so the
            # dashboard process runs in any case; the option only decides what we advertise.
            options["include_dashboard"] = True
            options["dashboard_host"] = "127.0.0.1"
            os.environ["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(self._root), os.environ.get("PYTHONPATH")])
            )
        try:
            info: Any = ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"at RAY_ADDRESS={address}" if address else "on this machine"
            first = (str(error) or repr(error)).strip().splitlines()[0]
            raise ClusterError(f"Ray cannot be reached or started {where}: {first}") from None
        url = info.address_info.get("webui_url")
        self.dashboard_url = f"http://{url}" if url and self.spec.dashboard else None
        board: Any = Board
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = board.options(
            name=f"progress of {self.run_name}", scheduling_strategy=here
        ).remote()
        self._wait_for_resources()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the Ray this run started, or leave the one it joined."""
        ray.shutdown()

    def _check_this_machine(self) -> None:
        """A local Ray has this machine's GPUs and no more: say so before anything starts."""
        if self.spec.num_nodes > 1:
            raise ClusterError(
                f"cluster {self.spec.name} needs {self._needs()}, and RAY_ADDRESS is not set: "
                f"{self.spec.description}; start Ray on the machines and set RAY_ADDRESS, or "
                "leave out +cluster to run on this machine"
            )

    def _needs(self) -> str:
        per_node = "GPUs" if self.spec.uses_gpu else "CPU workers"
        return f"{self.spec.num_workers} {per_node} on {self.spec.num_nodes} node(s)"

    def _wait_for_resources(self) -> None:
        spec = self.spec
        wanted = {
            "CPU": spec.num_workers * spec.cpus_per_worker,
            "GPU": spec.num_workers * spec.gpus_per_worker,
        }
        deadline_s = time.monotonic() + (spec.start_timeout_s if spec.num_nodes > 1 else 0)
        while True:
            have = ray.cluster_resources()
            if all(have.get(kind, 0) >= amount for kind, amount in wanted.items()):
                return
            if time.monotonic() >= deadline_s:
                there = ", ".join(f"{have.get(kind, 0):g} {kind}" for kind in wanted)
                needs = ", ".join(f"{amount:g} {kind}" for kind, amount in wanted.items())
                ray.shutdown()
                raise ClusterError(
                    f"cluster {spec.name} needs {needs}, Ray has {there} ({spec.description}); "
                    "set RAY_ADDRESS to a larger Ray, or choose another +cluster="
                )
            time.sleep(1.0)

    def run_workers(self, name: str, work: Work, payload: Any, storage: Path) -> None:
        """Run `work(context, payload)` once on every worker of the group, restarting after losses.

        Ray Train sets up torch.distributed (gloo, or NCCL on GPUs) and the visible devices before
        the call. A worker that dies restarts the whole group, up to `max_failures` times since the
        work last got further than before (by its `progress`); an exception that the work raised
        itself would come again, so it stops the run.

        Raises:
            WorkFailedError: the work raised, or workers kept dying.
        """
        spec, failures = self.spec, FailureLog(self.spec.max_failures)
        attempt = 0
        while True:
            board = self.cleared_board()
            suffix = f" (restart {attempt})" if attempt else ""
            trainer = TorchTrainer(
                _train_loop,
                train_loop_config={
                    "board": board, "name": name, "spec": spec, "work": work,
                    "payload": payload,
                },
                torch_config=TorchConfig(backend="nccl" if spec.uses_gpu else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=spec.num_workers,
                    use_gpu=spec.uses_gpu,
                    resources_per_worker=self._resources(),
                ),
                run_config=RunConfig(
                    name=f"{self.run_name} {name}{suffix}",
                    storage_path=str(storage.resolve()),
                    failure_config=FailureConfig(max_failures=0),
                ),
            )  # fmt: skip
            watch = self.watch()
            try:
                with watch:
                    trainer.fit()
                return
            except Exception as error:
                failure = ray.get(self._board.drain.remote())[1]
                if failure is not None and not is_peer_loss(failure):
                    raise WorkFailedError(**failure) from None
                lost = f"{name}: a worker was lost ({_last_line(error)})"
                if not isinstance(error, WorkerGroupError):
                    text = f"{name}: Ray Train failed: {_last_line(error)}; see {self.log_folder}"
                    raise WorkFailedError("RayTrainError", text, str(error)) from None
            verdict = failures.record("worker lost", lost, watch.furthest, is_infrastructure=True)
            if not verdict.retry:
                text = f"{lost}; {verdict.reason}; see Ray's logs in {self.log_folder}, then run "
                raise WorkFailedError("WorkerLost", f"{text}the same command again")
            attempt += 1
            self._on_event({"kind": "warning", "name": name, "text": f"{lost}; {verdict.reason}"})

    def run_tasks(self, name: str, work: Work, payloads: Sequence[Any], what: str) -> list[Any]:
        """Run `work(context, payload)` for each payload as Ray tasks; results in order.

        At most one per worker of the spec runs at a time, whatever else the cluster has.

        Args:
            name: stage, for the dashboard and the progress.
            work: a module-level function.
            payloads: one per task.
            what: the unit that the progress counts, in the plural.

        Raises:
            WorkFailedError: a task raised, or its worker kept dying.
        """
        board = self.cleared_board()
        # A GPU's memory is free again only when the process that used it has ended.
        remote = ray.remote(max_calls=1)(_task) if self.spec.uses_gpu else ray.remote(_task)
        results: list[Any] = [None] * len(payloads)
        with self.watch():
            pending: dict[Any, int] = {}
            waiting = iter(enumerate(payloads))

            def start(number: int) -> None:
                for index, payload in itertools.islice(waiting, number):
                    options = remote.options(
                        name=f"{name} {index + 1}/{len(payloads)}",
                        num_cpus=self.spec.cpus_per_worker,
                        num_gpus=self.spec.gpus_per_worker,
                        max_retries=self.spec.max_failures,
                    )
                    reference = options.remote(board, name, self.spec, work, payload)
                    pending[reference] = index

            start(self.spec.num_workers)
            done = 0
            while pending:
                ready, _ = ray.wait(list(pending), num_returns=1)
                results[pending.pop(ready[0])] = self._result(ready[0], name, list(pending))
                done += 1
                start(1)
                self.tell_done(name, done, len(payloads), what)
        return results

    def _result(self, reference: Any, name: str, others: list[Any]) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            for other in others:
                ray.cancel(other, force=True)
            raise self.failure_behind(name, error) from None

    def cleared_board(self) -> Any:
        """The board, everything on it forgotten: before a piece of work, whose calls post to it."""
        ray.get(self._board.clear.remote())
        return self._board

    def watch(self) -> Watch:
        """Around a piece of work: what is posted to the board goes to `on_event` as it comes."""
        return Watch(self._board, self._on_event)

    def tell_done(self, name: str, done: int, total: int, what: str) -> None:
        """Progress of work that the driver counts itself: `done` of `total` `what`."""
        event = {"kind": "progress", "name": name, "done": done, "total": total}
        self._on_event({**event, "text": what})

    def failure_behind(self, name: str, error: BaseException) -> WorkFailedError:
        """What to raise for a call that Ray says has failed: the work's own error, or its loss."""
        failure = ray.get(self._board.drain.remote())[1]
        if failure is not None:
            return WorkFailedError(**failure)
        text = f"{name}: a worker was lost ({_last_line(error)}); see {self.log_folder}"
        return WorkFailedError("WorkerLost", text)

    def _resources(self) -> dict[str, float]:
        resources: dict[str, float] = {"CPU": self.spec.cpus_per_worker}
        if self.spec.uses_gpu:
            resources["GPU"] = self.spec.gpus_per_worker
        return resources

    @property
    def log_folder(self) -> str:
        """Where Ray keeps the logs of this session's processes."""
        return str(Path(ray.get_runtime_context().get_temp_dir()) / "session_latest" / "logs")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


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
