"""The recipe beside each model that a run makes: how it came to be, as options that can be read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from conf.schema import Config, to_dict
from jobs.cli.recipe import NAME, read_recipe, recipe_text
from jobs.runs.context import StageContext
from jobs.runs.stage import Stage
from sparsify.errors import InputError
from sparsify.files import written_whole

STAGES = ("prune", "distill", "quantize")

_NOT_OF_A_MODEL = ("baselines",)
"""options that decide which other models are made"""


def write_recipes(
    stage: Stage, context: StageContext, folder: Path, metrics: dict[str, Any]
) -> None:
    """Write recipe.yaml into every model folder that a stage made.

    It is the recipe of the model that this one was made from, and this stage.

    Args:
        stage: one that has run.
        context: of the run; its warnings gain a line where a source's recipe cannot be read.
        folder: of the stage, not committed yet.
        metrics: that it returned.
    """
    if stage.name == "export":
        for path in sorted(folder.glob("*/config.json")):
            is_sparse = path.parent.name in ("sparse", "sparse-packed")
            made = {} if is_sparse else context.models.made.get("quantize", {})
            source = made.get("packed") or context.models.sparse("export")
            if (source / NAME).is_file() and not (path.parent / NAME).is_file():
                shutil.copyfile(source / NAME, path.parent / NAME)
        return
    if stage.name not in STAGES or stage.makes is None:
        return
    stages, options = ([], {}) if stage.name == "prune" else _of_source(stage, context)
    for name, place in stage.makes(metrics).items():
        own = _options(getattr(context.config, stage.name))
        if stage.name == "prune":
            own["method"] = name
        whole = {**options, stage.name: own}
        text = recipe_text([*stages, stage.name], whole, _defaults())
        with written_whole(folder / place / NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _of_source(stage: Stage, context: StageContext) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Stages and options of the model that a stage starts from; none where it says nothing."""
    path = context.models.sparse(stage.name) / NAME
    if not path.is_file():
        return [], {}
    try:
        recipe = read_recipe(path)
    except InputError as error:
        context.warnings.append(f"{error}; the recipe of what is made begins with {stage.name}")
        return [], {}
    stages = [name for name in STAGES if name in recipe.stages and name != stage.name]
    found = {name: dict(_defaults()[name]) for name in stages}
    for key, value in recipe.options.items():
        group, _, option = key.partition(".")
        if group in found:
            found[group][option] = value
    return stages, found


def _defaults() -> Mapping[str, dict[str, Any]]:
    config = Config()
    return {name: _options(getattr(config, name)) for name in STAGES}


def _options(group: Any) -> dict[str, Any]:
    """Options of a group that decide a model; no paths, which are of one machine."""
    left = {item.name for item in fields(group) if item.metadata.get("is_path")}
    left.update(_NOT_OF_A_MODEL)
    return {key: value for key, value in to_dict(group, deciding=True).items() if key not in left}
