"""The only place that starts Ray: a run's cluster, its groups of workers and its tasks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import ray
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterLostError, WorkFailedError
from cluster.machine import way_to
from cluster.metrics import Values
from cluster.preempt import abandon, check_signals
from cluster.runtime.board import Board, BoardLine, OnEvent, Watch
from cluster.runtime.export import Export
from cluster.runtime.hosts import wait_for_hosts, wait_for_resources
from cluster.runtime.processes import LocalRay
from cluster.runtime.restarts import Restarts
from cluster.runtime.start import check_address, check_this_machine, start_ray
from cluster.runtime.tasks import TaskProgress
from cluster.runtime.worker import Work, WorkerContext, guarded, is_peer_loss
from cluster.spec import ClusterSpec

_LOOK_EVERY_S = 0.1


def _train_loop(loop_config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    place = ray.train.get_context()
    board = loop_config["board"]
    context = WorkerContext(
        BoardLine(board), loop_config["name"], place.get_world_rank(),
        place.get_world_size(), loop_config["spec"], place.get_local_world_size(),
    )  # fmt: skip
    result = guarded(context, loop_config["work"], loop_config["payload"])
    if context.rank == 0:
        ray.get(board.finish.remote(loop_config["number"], result))


def _task(board: Any, name: str, spec: ClusterSpec, work: Work, payload: Any, index: int) -> Any:
    context = WorkerContext(BoardLine(board), name, 0, 1, spec, task=index)
    return guarded(context, work, payload)


class RayCluster:
    """A started or joined Ray, used as a context manager by one run.

    Args:
        spec: size and limits.
        run_name: shown in the dashboard.
        root: folder with the project's packages; shipped to a cluster in RAY_ADDRESS.
        on_event: called on a background thread with every event of the board.
    """

    def __init__(self, spec: ClusterSpec, run_name: str, root: Path, on_event: OnEvent) -> None:
        self.spec = spec
        self.run_name = run_name
        self.dashboard: str | None = None
        self._root = root
        self._tell = on_event
        self._values = Values(run_name)
        self._export: Export | None = None
        self._board: Any = None
        self._thread = ThreadPoolExecutor(1, "ray")
        self._local: LocalRay | None = None
        self._session: Path | None = None
        self._num_works = 0  # pieces of work that the board was cleared for
        self._excluded: set[str] = set()  # ids of nodes

    def __enter__(self) -> RayCluster:
        """Start Ray, or join the one in RAY_ADDRESS, and wait for what the spec needs."""
        address = os.environ.get("RAY_ADDRESS")
        if address:
            check_address(address)
        else:
            check_this_machine(self.spec)
            self._local = LocalRay()
            if cleared := self._local.begin():
                self._on_event({"kind": "info", "name": "ray", "text": cleared})
        try:
            self._call(self._start, address)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop the Ray this run started, or leave the one it joined.

        After a signal, or when Ray itself has died, its threads in this process may wait for ever,
        and to shut it down beside them could crash: then its processes are killed and the threads
        are left to the end of this process.
        """
        is_interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        is_lost, after = False, None
        if self._local is not None:
            is_lost = self._local.check() is not None
            self._local.is_ending()
            after = self._local.has_spoken
        is_abandoned = is_interrupted or is_lost
        if self._export is not None:
            self._export.end(wait=not is_abandoned)
        try:
            if is_abandoned:
                abandon(after)
            else:
                self._call(ray.shutdown)
        except KeyboardInterrupt:
            abandon(after)
            raise
        finally:
            self._thread.shutdown(wait=False)
            if self._local is not None:  # the logs stay when an error names them
                self._local.end(keep_folder=kind is not None and not is_interrupted)
                self._local = None

    def _call(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call it on the thread that speaks with Ray, and return what it returns.

        Ray waits in C++, at times without hearing signals; this thread waits where it can. It is
        one thread for all calls, because Ray's processes end with the thread that started them.

        Raises:
            ClusterLostError: the Ray of this machine has died.
        """
        future = self._thread.submit(call, *args)
        while not wait([future], timeout=_LOOK_EVERY_S).done:
            check_signals()
            if self._local is not None and self._local.lost is not None:
                raise ClusterLostError(self._local.lost)
        check_signals()
        if future.exception() and self._local and (lost := self._local.check()):
            raise ClusterLostError(lost)  # the reason of whatever else went wrong
        return future.result()

    def _start(self, address: str | None) -> None:
        """On Ray's thread: start or join it."""
        info = start_ray(self.spec, self.run_name, self._root, address)
        self._session = Path(info.address_info["session_dir"])
        if self._local is not None:
            self._local.look()
        if (url := info.address_info.get("webui_url")) and self.spec.dashboard:
            head = info.address_info["gcs_address"].rpartition(":")[0]
            is_here = head in (info.address_info["node_ip_address"], "127.0.0.1", "localhost")
            self.dashboard = way_to(f"http://{url}", "" if is_here else head)
        board: Any = Board
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = board.options(
            name=f"progress of {self.run_name}", scheduling_strategy=here
        ).remote()
        wait_for_resources(self.spec, self.spec.start_timeout_s if self.spec.num_nodes > 1 else 0)
        self._export = Export(self._values)

    def exclude(self, nodes: Collection[str]) -> bool:
        """Start nothing more on the machines of these names; False where the others are too few."""
        there: list[dict[str, Any]] = self._call(ray.nodes)
        wanted = {kind: amount for kind, amount in self._resources().items() if amount > 0}
        excluded, num_places = set(self._excluded), 0
        for node in there:
            if node["NodeManagerHostname"] in nodes:
                excluded.add(node["NodeID"])
            elif node["Alive"] and node["NodeID"] not in excluded:
                has = node["Resources"]
                num_places += int(min(has.get(kind, 0) // wanted[kind] for kind in wanted))
        known = {node["NodeManagerHostname"] for node in there}
        if num_places < self.spec.num_workers or not known.issuperset(nodes):
            return False
        self._excluded = excluded
        return True

    def _elsewhere(self) -> dict[str, str] | None:
        """The label that a node must have to be used; None: any will do."""
        if not self._excluded:
            return None
        return {"ray.io/node-id": f"!in({','.join(sorted(self._excluded))})"}

    def run_workers(self, name: str, work: Work, payload: Any, storage: Path) -> Any:
        """Run `work(context, payload)` once on every worker of the group, restarting after losses.

        Ray Train sets up torch.distributed (gloo, or NCCL on GPUs) and the visible devices before
        the call. A worker that dies restarts the whole group, up to `max_failures` times since the
        work last got further than before (by its `progress`); an exception that the work raised
        itself would come again, so it stops the run.

        Args:
            name: stage, for the dashboard and the progress.
            work: a module-level function.
            payload: the same for every worker.
            storage: folder for Ray Train's own files, on a disk that all workers see.

        Returns:
            What `work` returned on rank 0, of the start that all workers finished. Ray Train hands
            back nothing itself; the value goes over the board.

        Raises:
            WorkFailedError: the work raised, or workers kept dying.
            ClusterLostError: the Ray of this machine has died.
            HostLostError: a machine was lost and did not come back.
        """
        return self._call(self._run_workers, name, work, payload, storage)

    def _run_workers(self, name: str, work: Work, payload: Any, storage: Path) -> Any:
        spec, restarts = self.spec, Restarts(self.spec.max_failures)
        attempt = 0
        while True:
            wait_for_hosts(spec, lambda text: self._warn(name, f"{name}: {text}"))
            board, number = self._cleared_board()
            suffix = f" (restart {attempt})" if attempt else ""
            trainer = TorchTrainer(
                _train_loop,
                train_loop_config={
                    "board": board, "number": number, "name": name, "spec": spec, "work": work,
                    "payload": payload,
                },
                torch_config=TorchConfig(backend="nccl" if spec.uses_gpu else "gloo"),
                scaling_config=ScalingConfig(**self._scaling()),
                run_config=RunConfig(
                    name=f"{self.run_name} {name}{suffix}",
                    storage_path=str(storage.resolve()),
                    # Every loss is counted and said here; Ray would try to start for ever.
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                ),
            )  # fmt: skip
            watch = Watch(board, self._on_event)
            try:
                with watch:
                    trainer.fit()
                return ray.get(board.result.remote())
            except Exception as error:
                failure = self._failure()
                if failure is not None and not is_peer_loss(failure):
                    raise WorkFailedError(**failure) from None
                lost = f"{name}: a worker was lost ({_last_line(error)})"
                if not isinstance(error, WorkerGroupError) and not _has_not_started(error):
                    text = f"{name}: Ray Train failed: {_last_line(error)}; see {self.log_folder}"
                    raise WorkFailedError("RayTrainError", text, str(error)) from None
            finally:
                self._values.end(name)
            is_retried, reason = restarts.after_loss(watch.furthest)
            if not is_retried:
                text = f"{lost}; {reason}; see Ray's logs in {self.log_folder}, then run "
                raise WorkFailedError("WorkerLost", f"{text}the same command again")
            attempt += 1
            self._warn(name, f"{lost}; {reason}")

    def run_tasks(
        self, name: str, work: Work, payloads: Sequence[Any], what: str, steps: int | None = None
    ) -> list[Any]:  # fmt: skip
        """Run `work(context, payload)` for each payload as Ray tasks; results in order.

        At most one per worker of the spec runs at a time, whatever else the cluster has. A task
        whose worker dies is done again, up to `spec.max_failures` times.

        Args:
            name: stage, for the dashboard and the progress.
            work: a module-level function.
            payloads: one per task.
            what: the unit that the progress counts, in the plural.
            steps: how many of them a task is, where it tells how far it is; None: it is one.

        Raises:
            WorkFailedError: a task raised, or its worker kept dying.
            ClusterLostError: the Ray of this machine has died.
        """
        progress = TaskProgress(self._on_event, name, what, len(payloads), steps)
        found: list[Any] = self._call(self._run_tasks, name, work, payloads, what, progress)
        return found

    def _run_tasks(
        self, name: str, work: Work, payloads: Sequence[Any], what: str, progress: TaskProgress
    ) -> list[Any]:  # fmt: skip
        board, _ = self._cleared_board()
        # A GPU's memory is free again only when the process that used it has ended.
        remote = ray.remote(max_calls=1)(_task) if self.spec.uses_gpu else ray.remote(_task)
        results: list[Any] = [None] * len(payloads)
        losses: Counter[int] = Counter()
        waiting = list(reversed(range(len(payloads))))
        pending: dict[Any, int] = {}

        def start() -> None:
            while waiting and len(pending) < self.spec.num_workers:
                index = waiting.pop()
                options = remote.options(
                    name=f"{name} {index + 1}/{len(payloads)}",
                    num_cpus=self.spec.cpus_per_worker,
                    num_gpus=self.spec.gpus_per_worker,
                    max_retries=0,  # losses are counted here, and said
                    label_selector=self._elsewhere(),
                )
                pending[options.remote(board, name, self.spec, work, payloads[index], index)] = (
                    index
                )

        with Watch(board, progress.take):
            start()
            while pending:
                ready, _ = ray.wait(list(pending), num_returns=1)
                index = pending.pop(ready[0])
                try:
                    results[index] = ray.get(ready[0])
                except ray.exceptions.RayError as error:
                    losses[index] += 1
                    self._check_loss(name, what, losses[index], error, pending)
                    waiting.append(index)
                else:
                    progress.end(index)
                start()
        return results

    def _check_loss(
        self, name: str, what: str, count: int, error: Exception, pending: dict[Any, int]
    ) -> None:
        """After a task that Ray says has failed: whether its worker was lost and may be replaced.

        Raises:
            WorkFailedError: the work's own error, or one loss too many; the other tasks are ended.
        """
        failure = self._failure()
        has_died = not isinstance(error, ray.exceptions.RayTaskError)
        if failure is None and has_died and count <= self.spec.max_failures:
            self._warn(name, f"{name}: a worker was lost; doing its part again")
            return
        for other in pending:
            ray.cancel(other, force=True)
        if failure is not None:
            raise WorkFailedError(**failure) from None
        text = f"{name}: workers kept dying, {count} times at one of the {what}"
        if not has_died:  # not even the call of the work came about
            text = f"{name}: one of the {what} could not be started"
        text += f" ({_last_line(error)}); see {self.log_folder}"
        raise WorkFailedError("WorkerLost", text) from None

    def _cleared_board(self) -> tuple[Any, int]:
        """The board, everything on it forgotten, and the number of the work that it is for now."""
        self._num_works += 1
        ray.get(self._board.clear.remote(self._num_works))
        return self._board, self._num_works

    def _failure(self) -> dict[str, str] | None:
        """What the work itself has failed with, as it posted it."""
        found: dict[str, str] | None = ray.get(self._board.failure.remote())
        return found

    def _on_event(self, event: dict[str, Any]) -> None:
        self._values.take(event)
        self._tell(event)

    def _warn(self, name: str, text: str) -> None:
        self._on_event({"kind": "warning", "name": name, "text": text})

    def _resources(self) -> dict[str, float]:
        resources: dict[str, float] = {"CPU": self.spec.cpus_per_worker}
        if self.spec.uses_gpu:
            resources["GPU"] = self.spec.gpus_per_worker
        return resources

    def _scaling(self) -> dict[str, Any]:
        """What Ray Train is told of a group's size and place."""
        return {
            "num_workers": self.spec.num_workers,
            "use_gpu": self.spec.uses_gpu,
            "resources_per_worker": self._resources(),
            "label_selector": self._elsewhere(),
        }

    @property
    def log_folder(self) -> str:
        """Where Ray keeps the logs of this session's processes."""
        return "Ray's logs" if self._session is None else str(self._session / "logs")


def _has_not_started(error: Exception) -> bool:
    """Whether the group did not come about, as happens when a machine is lost meanwhile."""
    reasons = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, reasons)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
