"""The run's Ray: started when the first stage needs it, its errors brought back as ours."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.schema import Config
from sparsify import errors
from sparsify.errors import InputError, TwofourError

if TYPE_CHECKING:
    from cluster.runtime.backend import RayCluster
    from jobs.runs.display import Display

ROOT = Path(__file__).resolve().parents[2]


class Clusters:
    """Starts the run's Ray when the first stage needs it; a run that reuses all needs none."""

    def __init__(
        self, config: Config, run_name: str, display: Display, tracker: Any,
        stack: contextlib.ExitStack,
    ) -> None:  # fmt: skip
        self.warnings: list[str] = []
        self._config = config
        self._run_name = run_name
        self._display = display
        self._tracker = tracker
        self._stack = stack
        self._cluster: RayCluster | None = None

    def open(self) -> RayCluster:
        if self._cluster is None:
            from cluster.runtime.backend import RayCluster

            cluster = RayCluster(self._config.cluster, self._run_name, ROOT, self._on_event)
            with cluster_errors():
                self._cluster = self._stack.enter_context(cluster)
            if self._cluster.dashboard_url:
                url = self._cluster.dashboard_url
                self._display.say(f"Ray dashboard: {url} (its token: ray get-auth-token)")
        return self._cluster

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
    from cluster.errors import ClusterError, WorkFailedError

    try:
        yield
    except ClusterError as error:
        raise InputError(str(error)) from None
    except WorkFailedError as error:
        kind = getattr(errors, error.kind, None)
        if isinstance(kind, type) and issubclass(kind, TwofourError):
            raise kind(error.message) from None
        print(error.traceback, file=sys.stderr)
        raise TwofourError(f"{error.kind} on a worker: {error.message}") from None
