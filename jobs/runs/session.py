"""The run's Ray: started when the first stage needs it, its errors brought back as ours."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError, ClusterLostError, HostLostError, WorkFailedError
from cluster.executor import Executor
from cluster.plain import PlainCluster
from cluster.runtime import listen_here_alone
from cluster.spec import ClusterSpec
from cluster.stages import StagedClusterSpec
from jobs.runs.preflight import is_due, preflight
from jobs.runs.tracking import Tracker
from sparsify import errors
from sparsify.errors import InputError, MachineLostError, TwofourError

if TYPE_CHECKING:  # costs what only a run needs: rich
    from jobs.runs.display import Display

_ROOT = Path(__file__).resolve().parents[2]


def new_cluster(spec: ClusterSpec, name: str, on_event: Any) -> Executor:
    """What runs this project's work, yet to be entered; see `Executor`."""
    if spec.executor == "plain":
        return PlainCluster(spec, on_event)
    listen_here_alone()
    from cluster.runtime.backend import RayCluster  # costs Ray

    # Ray Train fails on other signs where the locale is not UTF-8; the name is only shown.
    return RayCluster(spec, name.encode("ascii", "replace").decode(), _ROOT, on_event)


class Clusters:
    """Starts the run's Ray when the first stage needs it; a run that reuses all needs none.

    One at a time: a stage with workers of another number or size gets a new one.
    """

    def __init__(
        self, run_dir: Path, display: Display, tracker: Tracker, stack: contextlib.ExitStack
    ) -> None:
        self.warnings: list[str] = []
        self._spec: StagedClusterSpec | None = None
        self._run_dir = run_dir
        self._display = display
        self._tracker = tracker
        self._stack = stack.enter_context(contextlib.ExitStack())
        self._cluster: Executor | None = None

    def open(self, spec: StagedClusterSpec) -> Executor:
        """The run's Ray, for the workers of a stage."""
        if self._spec is not None and not spec.has_workers_of(self._spec):
            self._cluster = None
            with cluster_errors():
                self._stack.close()
        if self._cluster is None:
            self._spec = spec
            cluster = new_cluster(spec, self._run_dir.name, self._on_event)
            with cluster_errors():
                self._cluster = self._stack.enter_context(cluster)
            if way := self._cluster.dashboard:
                self._display.say(f"Ray dashboard: {way} (its token: ray get-auth-token)")
            if is_due(spec):
                with cluster_errors():
                    odd = preflight(self._cluster, spec, self._run_dir, self._display.say)
                for text in odd:
                    self.warn(text)
        return self._cluster

    def warn(self, text: str) -> None:
        """A warning of the driver's own, shown and recorded like those of workers."""
        self._on_event({"kind": "warning", "text": text})

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "metrics":
            self._tracker.log(event["values"], event["step"])
            return
        if event["kind"] == "warning":
            self.warnings.append(event["text"])
        self._display.on_event(event)


@contextlib.contextmanager
def cluster_errors() -> Iterator[None]:
    """Bring an error of the cluster or of a worker back as one of ours."""
    try:
        yield
    except ClusterError as error:
        raise InputError(str(error)) from None
    except ClusterLostError as error:
        raise TwofourError(str(error)) from None
    except HostLostError as error:
        raise MachineLostError(str(error)) from None
    except WorkFailedError as error:
        kind = getattr(errors, error.kind, None)
        if isinstance(kind, type) and issubclass(kind, TwofourError):
            raise kind(error.message) from None
        print(error.traceback, file=sys.stderr)
        raise TwofourError(f"{error.kind} on a worker: {error.message}") from None
