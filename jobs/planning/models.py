"""A model's sizes, from the config.json of its folder or from those of a published one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from sparsify import costs
from sparsify.costs.shapes import ModelShape, read_shape
from sparsify.errors import InputError
from sparsify.files import embedded_path

_PUBLISHED = Path(costs.__file__).with_name("published")


@cache
def shape_of(path: str) -> tuple[ModelShape, str | None]:
    """The sizes of a model that need not be here.

    Args:
        path: model folder, of which config.json is enough; 'embedded'; or a name that ends like
            one of the published models, such as meta-llama/Llama-3.1-8B.

    Returns:
        Its sizes; and where they are from if not from a folder.

    Raises:
        InputError: neither; or a model that cannot be counted (`shapes.read_shape`).
    """
    if path == "embedded":
        return read_shape(_config(embedded_path())), None
    folder = Path(path)
    if (folder / "config.json").is_file():
        return read_shape(_config(folder)), None
    name = path.rstrip("/").rsplit("/", 1)[-1].lower()
    file = _PUBLISHED / f"{name}.json"
    if file.is_file() and not folder.exists():
        facts = json.loads(file.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**facts)
        return read_shape(config), f"{path} is not here: sizes as published"
    known = ", ".join(sorted(one.stem for one in _PUBLISHED.glob("*.json")))
    raise InputError(
        f"model.path={path}: no folder with a config.json, which is all that is needed, and not a "
        f"model whose sizes are known here ({known})"
    )


def _config(folder: Path) -> PretrainedConfig:
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        return found
    except (ValueError, OSError) as error:
        raise InputError(f"{folder}/config.json: {str(error).splitlines()[0]}") from None
