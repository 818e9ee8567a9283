"""Model folders by the stage that made them: found in earlier runs, added as stages finish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conf.schema import Config
from jobs.runs.artifact import RECORD
from jobs.runs.stage import Stage
from sparsify.errors import InputError
from sparsify.formats.sparse_folder import read_sparsity


@dataclass
class Models:
    """The models that there are; filled as stages finish."""

    dense: Path
    """the model everything is measured against, and the teacher"""
    stages: Sequence[Stage]
    """every stage, in the order in which stages run"""
    made: dict[str, dict[str, Path]] = field(default_factory=dict)
    """stage -> name -> model folder; the last name of a stage is what later ones build on"""
    method: str | None = None
    """how the sparse models were pruned"""

    def latest(self, before: str) -> tuple[str, Path]:
        """Name and folder of the last sparse model that a stage before this one made.

        Raises:
            InputError: there is none.
        """
        for stage in reversed(self.stages[: self._place(before)]):
            if self.made.get(stage.name) and not stage.is_end:
                return list(self.made[stage.name].items())[-1]
        raise InputError(
            f"stages: {before} needs a pruned model and there is none; add prune to stages, or "
            "point run.from= at a run or a pruned model folder"
        )

    def sparse(self, before: str) -> Path:
        """Folder of the `latest`."""
        return self.latest(before)[1]

    def all_sparse(self) -> dict[str, Path]:
        """Name -> folder of every sparse model that later stages can build on, as they came."""
        stages = [stage.name for stage in self.stages if not stage.is_end]
        return {n: path for stage in stages for n, path in self.made.get(stage, {}).items()}

    def add(self, stage: str, folder: Path) -> None:
        """Enter what a finished stage made."""
        makes = self.stages[self._place(stage)].makes
        if makes is None:
            return
        metrics = json.loads((folder / RECORD).read_text(encoding="utf-8"))["metrics"]
        self.made[stage] = {name: folder / path for name, path in makes(metrics).items()}
        if metrics.get("method") in self.made[stage]:
            self.method = metrics["method"]

    def add_run(self, run: Path, until: str | None = None) -> None:
        """Enter the finished stages of a run's folder, up to and with `until`."""
        last = len(self.stages) if until is None else self._place(until) + 1
        for stage in self.stages[:last]:
            if (run / stage.name / RECORD).is_file():
                self.add(stage.name, run / stage.name)

    def forget_descendants(self, stage: str) -> None:
        """Leave out what was made from the earlier result of a stage that was just made again."""
        place = self._place(stage)
        if self.stages[place].makes is not None:
            for later in self.stages[place + 1 :]:
                self.made.pop(later.name, None)

    def _place(self, name: str) -> int:
        return [stage.name for stage in self.stages].index(name)


def find_models(config: Config, run_dir: Path, stages: Sequence[Stage]) -> Models:
    """The models a run can start from: of run.from, and of the run's own finished stages.

    All folders are absolute: workers may be elsewhere.

    Raises:
        InputError: run.from is neither a run, nor a stage, nor a model folder; or a model that
            was pruned elsewhere comes without the dense model it is compared with.
    """
    source = config.run.from_
    if source is None:
        models = Models(_folder_of(config.model.path), stages)
    else:
        models = _models_from(_folder_of(source), config, stages)
    own = None if source is None else Path(source).resolve()
    if own != run_dir.resolve():
        models.add_run(run_dir)
    return models


def _folder_of(path: str) -> Path:
    from sparsify.models.load import resolve_path  # costs torch

    return resolve_path(path).absolute()


def _models_from(source: Path, config: Config, stages: Sequence[Stage]) -> Models:
    if not source.is_dir():
        raise InputError(f"run.from={source}: there is no such folder")
    names = [stage.name for stage in stages]
    is_stage = source.name in names and (source / RECORD).is_file()
    if is_stage or any((source / name / RECORD).is_file() for name in names):
        models = Models(Path(), stages)
        run, until = (source.parent, source.name) if is_stage else (source, None)
        models.add_run(run, until)
        models.dense = _dense_folder(config.model.teacher or _dense_of(models, run))
        return models
    if not (source / "config.json").is_file():
        raise InputError(
            f"run.from={source}: neither a run (no finished stage in it), nor a stage, nor a model "
            "folder (no config.json)"
        )
    sparsity = read_sparsity(source) or {}
    provenance = sparsity.get("provenance", {})
    dense = config.model.teacher or provenance.get("dense_path")
    if dense is None:
        if config.stages != ["evaluate"]:
            raise InputError(
                f"run.from={source}: a model folder does not say which dense model it came from; "
                "add model.teacher=FOLDER"
            )
        return Models(source, stages)
    method = str(sparsity.get("method", "given"))
    made = {"prune": {method: source}}
    if "num_recovery_tokens" in provenance and "distill" not in config.stages:
        made = {"distill": {"recovered": source}}
    return Models(_dense_folder(dense), stages, made, method)


def _dense_folder(path: str) -> Path:
    """The dense model's folder.

    Raises:
        InputError: it is gone.
    """
    folder = _folder_of(path)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model.teacher: the dense model {folder} is not there (any more); say where it is "
            "with model.teacher=FOLDER"
        )
    return folder


def _dense_of(models: Models, run: Path) -> str:
    for folder in reversed(models.all_sparse().values()):
        sparsity = read_sparsity(folder)
        if sparsity is not None:
            return str(sparsity["provenance"]["dense_path"])
    raise InputError(f"run.from={run}: has no pruned model; run its prune stage first")
