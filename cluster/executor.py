"""What runs the work of one run: the calls that Ray and plain processes both answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from cluster.runtime.worker import Work

OnEvent = Callable[[dict[str, Any]], None]


class Executor(Protocol):
    """Runs work on workers; a context manager, entered by one run."""

    dashboard: str | None
    """how a person reaches it"""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, /, *_: object) -> None: ...

    def exclude(self, nodes: Collection[str]) -> bool:
        """Start nothing more on these machines; False where the others have no room for the run."""

    def run_workers(self, name: str, work: Work, payload: Any, storage: Path) -> Any:
        """Run `work(context, payload)` on every worker of a group; what it returned on rank 0."""

    def run_tasks(
        self, name: str, work: Work, payloads: Sequence[Any], what: str, steps: int | None = None
    ) -> list[Any]:  # fmt: skip
        """Run `work(context, payload)` for each payload; results in order.

        `what`, in the plural, is what the progress counts: the tasks, or with `steps` as many to a
        task, which the work tells by `context.progress(done, steps)`.
        """
