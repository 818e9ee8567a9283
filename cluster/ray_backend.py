"""The importer of Ray: starts or joins a cluster, runs work on it, hears its progress.

A run is a few named pieces of work, one after another. `run_workers` runs a function once on each
of a group of workers that can talk to each other (Ray Train, torch.distributed set up by it);
`run_tasks` runs independent calls (Ray tasks). Both see a `WorkerContext` and nothing else of Ray.
Many small calls go through `ray_data.map_shards`, which is a part of this module in its own file.
Progress, metrics and failures travel over one `Board` actor, whose calls carry the stage and its
progress as their name, so the Ray dashboard shows them as they happen.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterError, WorkFailedError
from cluster.failures import FailureLog
from cluster.ray_worker import POLL_S, Board, Work, WorkerContext, guarded, is_peer_loss
from cluster.spec import ClusterSpec

OnProgress = Callable[[dict[str, Any]], None]

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
            excludes = [".git", ".venv", "runs", "tests", "docs", ".mypy_cache", ".ruff_cache"]
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


class Watch:
    """Reads the board on a thread while the work runs, and once more at the end.

    `furthest` is the last step that the work said to have done, None before the first.
    """

    def __init__(self, board: Any, on_event: OnProgress) -> None:
        self._board = board
        self._on_event = on_event
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None
        self.furthest: int | None = None

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _run(self) -> None:
        while True:
            stopping = self._stop.wait(POLL_S)
            try:
                events, _ = ray.get(self._board.drain.remote())
            except ray.exceptions.RayError:
                return  # the board went with its cluster; the work itself reports why
            try:
                for event in events:
                    if event["kind"] == "progress":
                        self.furthest = int(event["done"])
                    self._on_event(event)
            except Exception as error:  # the caller's, a full disk for one: raised at the end
                self._error = self._error or error
            if stopping:
                return
