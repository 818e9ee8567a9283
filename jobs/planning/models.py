"""A model's sizes, from the config.json of its folder or of the Hub's cache, or as published."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from transformers import AutoConfig

from jobs.runs.hub import cached_config
from sparsify import costs
from sparsify.costs.shapes import ModelShape, read_shape
from sparsify.errors import InputError
from sparsify.files import embedded_path
from sparsify.models.load import read_config

_PUBLISHED = Path(costs.__file__).with_name("published")


@cache
def shape_of(path: str) -> tuple[ModelShape, str | None]:
    """The sizes of a model that need not be here.

    Args:
        path: model folder, of which config.json is enough; 'embedded'; a name of the Hub whose
            config.json is in its cache; or a name that ends like one of the published models, such
            as meta-llama/Llama-3.1-8B.

    Returns:
        Its sizes; and where they are from if not from a folder.

    Raises:
        InputError: neither; or a model that cannot be counted (`shapes.read_shape`).
    """
    if path == "embedded":
        return read_shape(read_config(embedded_path())), None
    folder = Path(path)
    if (folder / "config.json").is_file():
        return read_shape(read_config(folder)), None
    cached = None if folder.exists() else cached_config(path)
    if cached is not None:
        return read_shape(read_config(cached)), f"{path}: config.json of the Hub's cache"
    name = path.rstrip("/").rsplit("/", 1)[-1].lower()
    file = _PUBLISHED / f"{name}.json"
    if file.is_file() and not folder.exists():
        facts = json.loads(file.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**facts)
        return read_shape(config), f"{path} is not here: sizes as published"
    known = ", ".join(sorted(one.stem for one in _PUBLISHED.glob("*.json")))
    raise InputError(
        f"model.path={path}: no folder with a config.json, which is all that is needed, none of "
        "that name in the Hub's cache (hf download NAME config.json), and not a model whose sizes "
        f"are known here ({known})"
    )
