"""Model folders by the stage that made them: found in earlier runs, added as stages finish."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import Config
from jobs.runs.artifact import RECORD, read_whole
from jobs.runs.hub import model_folder
from jobs.runs.stage import Stage
from sparsify.errors import InputError
from sparsify.files import readable
from sparsify.formats.sparse_folder import read_sparsity
from sparsify.pattern import DENSE

_PRETRAINED = Path("pretrain", "model")
"""in its run, the dense model of the stage pretrain"""


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
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """stage -> what its record says of these models, in whatever run it was made"""
    given: Path | None = None
    """the last model of run.from, from which layers are dropped"""

    @property
    def to_drop(self) -> Path:
        """The model that stage drop takes layers from."""
        return self.given or self.dense

    @property
    def to_prune(self) -> Path:
        """The model that stage prune makes sparse: the dense one, or what is left of it."""
        return self.made["drop"]["dropped"] if "drop" in self.made else self.dense

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

    def require_zeros(self, config: Config, stage: str) -> None:
        """Refuse a stage that packs zeros where the model that it would get has none.

        Raises:
            InputError: the model only lost layers.
        """
        if "prune" in config.stages:
            return
        folder = self.to_drop if "drop" in config.stages else self.sparse(stage)
        found = read_sparsity(folder) or {}
        is_dense = folder == self.dense or found.get("pattern") == DENSE
        if is_dense:
            raise InputError(
                f"{stage}: {folder} only lost layers and has no zeros to pack; its folder loads as "
                "it is, or prune it first: add prune to stages"
            )

    def all_sparse(self) -> dict[str, Path]:
        """Name -> folder of every sparse model that later stages can build on, as they came."""
        stages = [stage.name for stage in self.stages if not stage.is_end]
        return {n: path for stage in stages for n, path in self.made.get(stage, {}).items()}

    def add(self, stage: str, folder: Path) -> None:
        """Enter what a finished stage made."""
        makes = self.stages[self._place(stage)].makes
        if makes is None:
            return
        metrics = read_whole(folder)["metrics"]
        self.made[stage] = {name: folder / path for name, path in makes(metrics).items()}
        self.metrics[stage] = metrics
        if metrics.get("method") in self.made[stage]:
            self.method = metrics["method"]

    def add_run(self, run: Path, until: str | None = None, without: Collection[str] = ()) -> None:
        """Enter the finished stages of a run's folder, up to and with `until`.

        Those that are to be made again, `without`, are not looked at: they may be damaged.
        """
        last = len(self.stages) if until is None else self._place(until) + 1
        for stage in self.stages[:last]:
            if stage.name not in without and (run / stage.name / RECORD).is_file():
                self.forget_descendants(stage.name)  # those of an earlier run
                self.add(stage.name, run / stage.name)

    def forget_descendants(self, stage: str) -> None:
        """Leave out what was made from the earlier result of a stage that was just made again."""
        place = self._place(stage)
        if self.stages[place].makes is not None:
            for later in self.stages[place + 1 :]:
                self.made.pop(later.name, None)
                self.metrics.pop(later.name, None)

    def _place(self, name: str) -> int:
        return [stage.name for stage in self.stages].index(name)


def find_models(
    config: Config, run_dir: Path, stages: Sequence[Stage], again: Collection[str] = (),
    fetch: bool = True,
) -> Models:  # fmt: skip
    """The models a run can start from: of run.from, and of the run's own finished stages.

    What is only evaluated may be model.path too, whatever kind of model it is.

    All folders are absolute: workers may be elsewhere.

    Args:
        config: of the run.
        run_dir: its folder.
        stages: every stage there is.
        again: stages of the run that will be made again, whatever there is of them.
        fetch: download the weights of models of the Hub; False for what describes them alone.

    Raises:
        InputError: run.from (or model.path) is neither a run, nor a stage, nor a model folder; or a
            model that was pruned elsewhere comes without the dense model it is compared with; or a
            stage is damaged.
    """
    option, text = "run.from", config.run.from_
    if text is None and config.stages == ["evaluate"]:
        option, text = "model.path", config.model.path
    if "pretrain" in config.stages:
        return Models(run_dir / _PRETRAINED, stages)  # which is yet to be made
    if text is None:
        models = Models(model_folder("model.path", config.model.path, fetch), stages)
        own = None
    else:
        source = model_folder(option, text, fetch)
        own = source.resolve()
        given = again if own == run_dir.resolve() else ()
        models = _models_from(option, source, config, stages, given, fetch)
        models.given = next(reversed(_to_build_on(models)), None)
    if own != run_dir.resolve():
        models.add_run(run_dir, without=again)
    return models


def _models_from(
    option: str, source: Path, config: Config, stages: Sequence[Stage], again: Collection[str],
    fetch: bool,
) -> Models:  # fmt: skip
    names = [stage.name for stage in stages]
    with readable(f"{option}={source}"):
        if not source.is_dir():
            raise InputError(f"{option}={source}: there is no such folder")
        is_stage = source.name in names and (source / RECORD).is_file()
        is_run = any((source / name / RECORD).is_file() for name in names)
        is_model = (source / "config.json").is_file()
    if is_stage or is_run:
        models = Models(Path(), stages)
        run, until = (source.parent, source.name) if is_stage else (source, None)
        models.add_run(run, until, again)
        models.dense = _dense_folder(config.model.teacher or _dense_of(models, run), fetch)
        return models
    if not is_model:
        raise InputError(
            f"{option}={source}: neither a run (no finished stage in it), nor a stage, nor a model "
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
    if sparsity.get("pattern") == DENSE:
        made = {"drop": {"dropped": source}}
    if "num_recovery_tokens" in provenance and "distill" not in config.stages:
        made = {"distill": {"recovered": source}}
    if "num_finetuning_tokens" in provenance and not {"distill", "finetune"} & {*config.stages}:
        made = {"finetune": {"finetuned": source}}
    return Models(_dense_folder(dense, fetch), stages, made, method)


def _to_build_on(models: Models) -> list[Path]:
    """Of each stage's models the one that later stages build on, in the order of stages."""
    stages = [stage.name for stage in models.stages if not stage.is_end]
    return [list(models.made[name].values())[-1] for name in stages if models.made.get(name)]


def _dense_folder(text: str, fetch: bool) -> Path:
    """The dense model's folder.

    Raises:
        InputError: it is gone.
    """
    folder = model_folder("model.teacher", text, fetch)
    with readable(f"model.teacher: the dense model {folder}"):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(
        f"model.teacher: the dense model {folder} is not there (any more); say where it is "
        "with model.teacher=FOLDER"
    )


def _dense_of(models: Models, run: Path) -> str:
    for folder in reversed(models.all_sparse().values()):
        sparsity = read_sparsity(folder)
        if sparsity is not None and "dense_path" in sparsity["provenance"]:
            return str(sparsity["provenance"]["dense_path"])
    if (run / _PRETRAINED).is_dir():
        return str(run / _PRETRAINED)
    raise InputError(f"run.from={run}: has no pruned model; run its prune stage first")
