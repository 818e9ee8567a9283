"""What every stage of a run shares: the config, the folders, the models so far, the cluster.

A stage is a module of this package with two functions: `identity(context)`, the plain values that
decide its result, and `run(context, writer)`, which fills the writer's folder and returns metrics.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.schema import STAGES, Config, to_dict
from jobs._artifact import RECORD, SPARSITY, model_fingerprint, write_json
from sparsify.errors import InputError

if TYPE_CHECKING:
    from cluster.ray_backend import RayCluster
    from jobs._progress import Display
    from jobs._tracking import Tracker

# In a folder of its own: loaders take every *.safetensors beside config.json for weights.
MASKS = "sparsity/masks.safetensors"
PACKED = "model.packed.safetensors"


_ONLY_SPEED = {
    "micro_batch_size", "checkpoint_every_steps", "checkpoint_every_blocks", "activations",
    "overlap", "attention",
    "zero_stage", "zero_hpz_size", "offload_optimizer", "compile", "recompute_share",
    "teacher_placement", "keep_checkpoints", "milestone_every_steps", "mtbf_hours",
    "heldout_every_steps", "heldout_tokens", "time_limit_hours", "time_reserve_s", "hang_after_s",
    "pause_limit_s", "checksum_every_steps",
}  # fmt: skip
"""options that change memory and speed, and a result by rounding at most"""


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
        """The named config groups as plain values, for a stage's identity."""
        plain = to_dict(self.config)
        return {
            group: {
                key: value
                for key, value in plain[group].items()
                if key not in _ONLY_SPEED and (key != "batch_size" or group == "distill")
            }
            for group in groups
        }


def read_sparsity(folder: Path) -> dict[str, Any] | None:
    """`sparsity.json` of a model folder, or None when it has none.

    Raises:
        InputError: it is not readable.
    """
    path = folder / SPARSITY
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(
            f"{path}: not JSON ({error}); restore it or prune the model again"
        ) from None


def write_sparsity(
    folder: Path,
    masks: Mapping[str, Any],
    pattern: str,
    method: str,
    provenance: dict[str, Any],
) -> None:
    """Describe the zeros of a model folder: pattern, mask hash per layer, where it came from."""
    from sparsify.masks import mask_digest

    layers = {}
    for name in sorted(masks):
        mask = masks[name]  # one at a time: they may come from a file
        layers[name] = {
            "shape": list(mask.shape),
            "num_kept": int(mask.sum()),
            "keep_mask_sha256": mask_digest(mask),
        }
    value = {
        "format": "twofour-sparsity", "version": 1, "pattern": pattern, "method": method,
        "provenance": provenance, "layers": layers,
    }  # fmt: skip
    write_json(folder / SPARSITY, value)


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


def heldout_inputs(context: StageContext) -> dict[str, str]:
    """For identities: held-out text of its own decides which documents are not trained on."""
    from jobs._sources import source_fingerprint

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
