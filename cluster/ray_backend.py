"""The importer of Ray: starts or joins a cluster, runs work on it, hears its progress.

A run is a few named pieces of work, one after another. `run_workers` runs a function once on each
of a group of workers that can talk to each other (Ray Train, torch.distributed set up by it);
`run_tasks` runs independent calls (Ray tasks). Both see a `WorkerContext` and nothing else of Ray.
Many small calls go through `ray_data.map_shards`, which is a part of this module in its own file.
Progress, metrics and failures travel over one `Board` actor, whose calls carry the stage and its
progress as their name, so the Ray dashboard shows them as they happen.
"""

from __future__ import annotations

import math
import os
import threading
import time
import traceback as traceback_module
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterError, WorkFailedError
from cluster.spec import ClusterSpec

Work = Callable[["WorkerContext", Any], Any]
OnProgress = Callable[[dict[str, Any]], None]

_POLL_S = 0.25
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


_PEER_LOST = ("connection closed", "connection reset", "broken pipe", "nccl", "gloo", "timed out")


def _is_peer_loss(failure: dict[str, str]) -> bool:
    """Whether an exception only says that another worker of the group is gone."""
    kinds = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")
    text = failure["message"].lower()
    return failure["kind"] in kinds and any(word in text for word in _PEER_LOST)


@ray.remote(num_cpus=0)
class Board:
    """Where workers post progress, metrics and failures, and where the driver reads them."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._failure: dict[str, str] | None = None

    def post(self, event: dict[str, Any]) -> None:
        """Add one event."""
        self._events.append(event)

    def fail(self, kind: str, message: str, traceback: str) -> None:
        """Record a failure: the first one, or the first that is not the loss of a peer."""
        failure = {"kind": kind, "message": message, "traceback": traceback}
        if self._failure is None or (_is_peer_loss(self._failure) and not _is_peer_loss(failure)):
            self._failure = failure

    def drain(self) -> tuple[list[dict[str, Any]], dict[str, str] | None]:
        """Events since the last call, and the failure if there is one."""
        events, self._events = self._events, []
        return events, self._failure

    def clear(self) -> None:
        """Forget everything, before the next piece of work."""
        self._events, self._failure = [], None


class WorkerContext:
    """What a worker knows of where it runs."""

    def __init__(
        self, board: Any, name: str, rank: int, world_size: int, spec: ClusterSpec,
        local_world_size: int = 1,
    ) -> None:  # fmt: skip
        self.name = name
        self.rank = rank
        self.world_size = world_size
        self.local_world_size = local_world_size  # workers on this node
        self.num_threads = spec.threads_per_worker
        self.device = "cuda" if spec.uses_gpu else "cpu"
        self._board = board
        self._last_post_s = 0.0

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Say how far this piece of work is; at most a few times a second leave the process."""
        now_s = time.monotonic()
        if self.rank == 0 and (done >= total or now_s - self._last_post_s >= _POLL_S):
            self._last_post_s = now_s
            event = {"kind": "progress", "name": self.name, "done": done, "total": total}
            label = f"{self.name} {done:g}/{total:g}"
            self._board.post.options(name=label).remote({**event, "text": text})

    def metrics(self, values: dict[str, Any], step: int | None = None) -> None:
        """Send figures to the run's tracker (rank 0 only)."""
        if self.rank == 0:
            event = {"kind": "metrics", "name": self.name, "values": values, "step": step}
            self._board.post.options(name=f"{self.name} metrics").remote(event)

    def warn(self, message: str) -> None:
        """Send a warning to the terminal and the report (rank 0 only)."""
        if self.rank == 0:
            self._board.post.remote({"kind": "warning", "name": self.name, "text": message})

    def alert(self, message: str) -> None:
        """`warn` from any worker, of something that concerns this one."""
        text = f"{self.name}: worker {self.rank}: {message}"
        self._board.post.remote({"kind": "warning", "name": self.name, "text": text})


def _guarded(context: WorkerContext, work: Work, payload: Any) -> Any:
    """Run the work; post a failure to the board before it takes the process down."""
    try:
        return work(context, payload)
    except Exception as error:
        trace = traceback_module.format_exc()
        message = str(error) or repr(error)
        ray.get(context._board.fail.remote(type(error).__name__, message, trace))
        raise


def _train_loop(loop_config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    place = ray.train.get_context()
    context = WorkerContext(
        loop_config["board"], loop_config["name"], place.get_world_rank(),
        place.get_world_size(), loop_config["spec"], place.get_local_world_size(),
    )  # fmt: skip
    _guarded(context, loop_config["work"], loop_config["payload"])


def _task(board: Any, name: str, spec: ClusterSpec, work: Work, payload: Any) -> Any:
    return _guarded(WorkerContext(board, name, 0, 1, spec), work, payload)


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
        the call. A worker that dies restarts the whole group, up to `max_failures` times; an
        exception that the work raised itself would come again, so it stops the run.

        Raises:
            WorkFailedError: the work raised, or workers kept dying.
        """
        spec = self.spec
        for attempt in range(spec.max_failures + 1):
            ray.get(self._board.clear.remote())
            suffix = f" (restart {attempt})" if attempt else ""
            trainer = TorchTrainer(
                _train_loop,
                train_loop_config={
                    "board": self._board, "name": name, "spec": spec, "work": work,
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
            try:
                with _Watch(self._board, self._on_event):
                    trainer.fit()
                return
            except Exception as error:
                failure = ray.get(self._board.drain.remote())[1]
                if failure is not None and not _is_peer_loss(failure):
                    raise WorkFailedError(**failure) from None
                lost = f"{name}: a worker was lost ({_last_line(error)})"
                if not isinstance(error, WorkerGroupError):
                    text = f"{name}: Ray Train failed: {_last_line(error)}; see {self.log_folder}"
                    raise WorkFailedError("RayTrainError", text, str(error)) from None
            text = f"{lost}; restarting, {spec.max_failures - attempt} more times"
            self._on_event({"kind": "warning", "name": name, "text": text})
        raise WorkFailedError(
            "WorkerLost",
            f"{lost}, {spec.max_failures + 1} times; see Ray's logs in {self.log_folder}, then run "
            "the same command again",
        )

    def run_tasks(self, name: str, work: Work, payloads: Sequence[Any], what: str) -> list[Any]:
        """Run `work(context, payload)` for each payload as Ray tasks; results in order.

        Args:
            name: stage, for the dashboard and the progress.
            work: a module-level function.
            payloads: one per task.
            what: the unit that the progress counts, in the plural.

        Raises:
            WorkFailedError: a task raised, or its worker kept dying.
        """
        ray.get(self._board.clear.remote())
        # A GPU's memory is free again only when the process that used it has ended.
        remote = ray.remote(max_calls=1)(_task) if self.spec.uses_gpu else ray.remote(_task)
        results: list[Any] = [None] * len(payloads)
        with _Watch(self._board, self._on_event):
            pending = {}
            for index, payload in enumerate(payloads):
                options = remote.options(
                    name=f"{name} {index + 1}/{len(payloads)}",
                    num_cpus=self.spec.cpus_per_worker,
                    num_gpus=self.spec.gpus_per_worker,
                    max_retries=self.spec.max_failures,
                )
                reference = options.remote(self._board, name, self.spec, work, payload)
                pending[reference] = index
            done = 0
            while pending:
                ready, _ = ray.wait(list(pending), num_returns=1)
                results[pending.pop(ready[0])] = self._result(ready[0], name, list(pending))
                done += 1
                event = {"kind": "progress", "name": name, "done": done, "total": len(payloads)}
                self._on_event({**event, "text": what})
        return results

    def _result(self, reference: Any, name: str, others: list[Any]) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            for other in others:
                ray.cancel(other, force=True)
            failure = ray.get(self._board.drain.remote())[1]
            if failure is not None:
                raise WorkFailedError(**failure) from None
            text = f"{name}: a worker was lost ({_last_line(error)}); see {self.log_folder}"
            raise WorkFailedError("WorkerLost", text) from None

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


class _Watch:
    """Reads the board on a thread while the work runs, and once more at the end."""

    def __init__(self, board: Any, on_event: OnProgress) -> None:
        self._board = board
        self._on_event = on_event
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _run(self) -> None:
        while True:
            stopping = self._stop.wait(_POLL_S)
            try:
                events, _ = ray.get(self._board.drain.remote())
            except ray.exceptions.RayError:
                return  # the board went with its cluster; the work itself reports why
            try:
                for event in events:
                    self._on_event(event)
            except Exception as error:  # the caller's, a full disk for one: raised at the end
                self._error = self._error or error
            if stopping:
                return
