"""Model folders by what has been done to them: found in earlier runs, added as stages finish."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from conf.options.run import STAGES
from conf.schema import Config
from jobs.runs.artifact import RECORD
from sparsify.errors import InputError
from sparsify.formats.sparse_folder import read_sparsity

if TYPE_CHECKING:
    pass


@dataclass
class Models:
    """Model folders by what has been done to them; filled as stages finish."""

    dense: Path
    """the model everything is measured against, and the teacher"""
    pruned: dict[str, Path] = field(default_factory=dict)
    """method -> one-shot pruned model"""
    method: str | None = None
    """the method that later stages build on"""
    recovered: Path | None = None
    """after distillation"""
    packed_int4: Path | None = None
    """packed file of the quantised model's folder"""

    def sparse(self, stage: str) -> Path:
        """The best sparse model so far: what quantisation and export start from.

        Raises:
            InputError: there is none.
        """
        if self.recovered is not None:
            return self.recovered
        return self.student(stage)

    def student(self, stage: str) -> Path:
        """The one-shot pruned model that recovery starts from."""
        if self.method is None or self.method not in self.pruned:
            raise InputError(
                f"stages: {stage} needs a pruned model and there is none; add prune to stages, or "
                "point run.from= at a run or a pruned model folder"
            )
        return self.pruned[self.method]


def find_models(config: Config, run_dir: Path) -> Models:
    """The models a run can start from: of run.from, and of the run's own finished stages.

    All folders are absolute: workers may stand elsewhere.

    Raises:
        InputError: run.from is neither a run, nor a stage, nor a model folder; or a model that
            was pruned elsewhere comes without the dense model it is compared with.
    """
    from sparsify.models.load import resolve_path

    source = config.run.from_
    if source is None:
        models = Models(dense=resolve_path(config.model.path).absolute())
    else:
        models = _models_from(resolve_path(source).absolute(), config)
    own = None if source is None else Path(source).resolve()
    if own != run_dir.resolve():
        _add_stages(models, run_dir)
    return models


def _models_from(source: Path, config: Config) -> Models:
    if not source.is_dir():
        raise InputError(f"run.from={source}: there is no such folder")
    is_stage = source.name in STAGES and (source / RECORD).is_file()
    if is_stage or any((source / stage / RECORD).is_file() for stage in STAGES):
        run = source.parent if is_stage else source
        models = Models(dense=Path())
        upto = STAGES[: STAGES.index(source.name) + 1] if is_stage else STAGES
        _add_stages(models, run, upto)
        dense = config.model.teacher or _dense_of(models, run)
        models.dense = resolve_dense(dense)
        return models
    if not (source / "config.json").is_file():
        raise InputError(
            f"run.from={source}: neither a run (no finished stage in it), nor a stage, nor a model "
            "folder (no config.json)"
        )
    sparsity = read_sparsity(source)
    dense = config.model.teacher or (sparsity or {}).get("provenance", {}).get("dense_path")
    if dense is None:
        if config.stages != ["evaluate"]:
            raise InputError(
                f"run.from={source}: a model folder does not say which dense model it came from; "
                "add model.teacher=FOLDER"
            )
        return Models(dense=source)
    method = str((sparsity or {}).get("method", "given"))
    provenance = (sparsity or {}).get("provenance", {})
    if "num_recovery_tokens" in provenance and "distill" not in config.stages:
        return Models(dense=resolve_dense(dense), method=method, recovered=source)
    return Models(dense=resolve_dense(dense), pruned={method: source}, method=method)


def resolve_dense(path: str) -> Path:
    """The dense model's folder.

    Raises:
        InputError: it is gone.
    """
    from sparsify.models.load import resolve_path

    folder = resolve_path(path).absolute()
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model.teacher: the dense model {folder} is not there (any more); say where it is "
            "with model.teacher=FOLDER"
        )
    return folder


def _dense_of(models: Models, run: Path) -> str:
    for folder in [models.recovered, *models.pruned.values()]:
        sparsity = read_sparsity(folder) if folder is not None else None
        if sparsity is not None:
            return str(sparsity["provenance"]["dense_path"])
    raise InputError(f"run.from={run}: has no pruned model; run its prune stage first")


def _add_stages(models: Models, run: Path, upto: tuple[str, ...] = STAGES) -> None:
    """Enter the finished stages of a run folder."""
    for stage in upto:
        if (run / stage / RECORD).is_file():
            add_finished(models, stage, run / stage)


def forget_descendants(models: Models, stage: str) -> None:
    """Leave out what was made from the earlier result of a stage that was just made anew."""
    if stage == "prune":
        models.recovered = None
    if stage in ("prune", "distill"):
        models.packed_int4 = None


def add_finished(models: Models, stage: str, folder: Path) -> None:
    """Enter what a finished stage made."""
    if stage == "prune":
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        models.method = record["metrics"]["method"]
        models.pruned = {name: folder / name for name in record["metrics"]["methods"]}
    elif stage == "distill":
        models.recovered = folder / "model"
    elif stage == "quantize":
        models.packed_int4 = folder / "packed"
