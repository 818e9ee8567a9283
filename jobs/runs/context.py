"""What every stage of a run shares: the config, the folders, the models so far, the cluster.

A stage is a module of this package with two functions: `identity(context)`, the plain values that
decide its result, and `run(context, writer)`, which fills the writer's folder and returns metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.schema import Config, to_dict
from jobs.runs.models import Models
from sparsify.formats.sparse_folder import model_fingerprint, read_sparsity

if TYPE_CHECKING:
    from cluster.runtime.backend import RayCluster
    from jobs.runs.display import Display
    from jobs.runs.tracking import Tracker


@dataclass
class StageContext:
    """One run, as its stages see it."""

    config: Config
    worker_config: Config
    """the same with absolute paths, for workers, which may stand elsewhere"""
    run_dir: Path
    command: str
    models: Models
    display: Display
    tracker: Tracker
    open_cluster: Callable[[], RayCluster]
    warnings: list[str] = field(default_factory=list)
    statuses: dict[str, str] = field(default_factory=dict)
    """stage -> ran or reused, for the stages that are done"""

    @property
    def cluster(self) -> RayCluster:
        """The run's Ray, started at first use."""
        return self.open_cluster()

    def settings(self, *groups: str) -> dict[str, Any]:
        """The named groups without what decides only speed, as plain values for an identity."""
        return {group: to_dict(getattr(self.config, group), deciding=True) for group in groups}


def heldout_inputs(context: StageContext) -> dict[str, str]:
    """For identities: held-out text of its own decides which documents are not trained on."""
    from jobs.corpus.sources import source_fingerprint

    if context.config.data.heldout is None:
        return {}
    return {"heldout": source_fingerprint(context.config.data, "heldout")}


def given_masks(config: Config, folder: Path) -> dict[str, Any]:
    """For identities: the options that say where the masks of a foreign model are."""
    if read_sparsity(folder) is not None:
        return {}
    return {"prune.pattern": config.prune.pattern, "prune.skip": config.prune.skip}


def fingerprints(folders: dict[str, Path]) -> dict[str, str]:
    """Name -> fingerprint of each model folder."""
    return {name: model_fingerprint(folder) for name, folder in folders.items()}
