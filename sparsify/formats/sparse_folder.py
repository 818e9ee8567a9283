"""A sparse model's folder: sparsity.json, files of masks and packed weights, its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.errors import InputError
from sparsify.files import file_sha256, write_json

SPARSITY = "sparsity.json"

# In a folder of their own: loaders take every *.safetensors beside config.json for weights.
MASKS = "sparsity/masks.safetensors"

ROTATION = "sparsity/rotation.safetensors"

PACKED = "model.packed.safetensors"


def hub_reference(folder: Path) -> str | None:
    """ORGANISATION/NAME@COMMIT of a folder in the cache of the Hugging Face Hub, by its path."""
    parts = folder.parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or not parts[0].startswith("models--"):
        return None
    return f"{'/'.join(parts[0].split('--')[1:])}@{parts[2]}"


def model_name(folder: Path) -> str:
    """What a person calls the model of a folder."""
    return hub_reference(folder) or folder.name


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over the files of a model folder that decide what it computes and how it tokenises.

    A file that only describes (README, generation defaults, records) does not count. In the Hub's
    cache the commit counts, whatever else of the model has been downloaded there.
    """
    if reference := hub_reference(folder):
        return hashlib.sha256(reference.encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        names = ("config.json", "tokenizer.json", "tokenizer_config.json", SPARSITY)
        if path.suffix in (".safetensors", ".model") or path.name in names:
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def read_sparsity(folder: Path) -> dict[str, Any] | None:
    """`sparsity.json` of a model folder, or None when it has none.

    Raises:
        InputError: it is not readable.
    """
    path = folder / SPARSITY
    if not path.is_file():
        return None
    fix = "restore it or prune the model again"
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {fix}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a {type(value).__name__} and no object; {fix}")
    for key, kind in (("pattern", str), ("provenance", dict)):
        if not isinstance(value.get(key), kind):
            raise InputError(f"{path}: says no {key}; {fix}")
    return value


def write_sparsity(
    folder: Path,
    masks: Mapping[str, Any],
    pattern: str,
    method: str,
    provenance: dict[str, Any],
) -> None:
    """Describe the zeros of a model folder: pattern, mask hash per layer, where it came from."""
    # Here: the rest of the file is read where torch is not loaded.
    from sparsify.masks.storage import mask_digest

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
