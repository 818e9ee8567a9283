"""What every stage of a run shares: the config, the folders, the models so far, the cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.executor import Executor
from conf.schema import Config, to_dict
from jobs.runs.models import Models
from jobs.runs.tracking import Tracker
from sparsify.formats.sparse_folder import hub_reference, model_fingerprint, read_sparsity

if TYPE_CHECKING:  # they cost what only a run needs: torch, rich
    from jobs.corpus.survey import Texts
    from jobs.runs.display import Display


@dataclass
class StageContext:
    """One run, as its stages see it."""

    config: Config
    worker_config: Config
    """the same with absolute paths, for workers, which may be elsewhere"""
    run_dir: Path
    command: str
    models: Models
    display: Display
    tracker: Tracker
    open_cluster: Callable[[], Executor]
    warnings: list[str] = field(default_factory=list)
    statuses: dict[str, str] = field(default_factory=dict)
    """stage -> ran or reused, for the stages that are done"""
    texts: Texts | None = None
    """what the run's sources hold; None where no stage reads text"""
    notes: list[str] = field(default_factory=list)
    """what is left out of the text that the stage at work reads, for its record"""

    @property
    def cluster(self) -> Executor:
        """What runs the work, started at first use."""
        return self.open_cluster()

    def settings(self, *groups: str) -> dict[str, Any]:
        """The named groups without what decides only speed, as plain values for an identity."""
        return {group: to_dict(getattr(self.config, group), deciding=True) for group in groups}

    def source_fingerprint(self, which: Literal["calibration", "train", "heldout"]) -> str:
        """Fingerprint of the run's `train`, `calibration` or `heldout` text, for identities."""
        assert self.texts is not None, "a run that reads text"
        fingerprint = self.texts.fingerprint(which)
        self.notes += [line for line in self.texts.remarks(which) if line not in self.notes]
        return fingerprint

    def heldout_inputs(self) -> dict[str, str]:
        """For identities: held-out text of its own decides which documents are not trained on."""
        if self.config.data.heldout is None:
            return {}
        return {"heldout": self.source_fingerprint("heldout")}

    def given_masks(self, folder: Path) -> dict[str, Any]:
        """For identities: the options that say where the masks of a foreign model are."""
        if read_sparsity(folder) is not None:
            return {}
        prune = self.config.prune
        return {"prune.pattern": prune.pattern, "prune.skip": prune.skip}


def fingerprints(folders: dict[str, Path]) -> dict[str, str]:
    """Name -> fingerprint of each model folder; of one of the Hub its name and commit."""
    return {n: hub_reference(folder) or model_fingerprint(folder) for n, folder in folders.items()}
