"""A sparse model's folder: sparsity.json, the file of masks, its fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.errors import InputError
from sparsify.files import file_sha256, write_json

SPARSITY = "sparsity.json"

# In a folder of their own: loaders take every *.safetensors beside config.json for weights.
MASKS = "sparsity/masks.safetensors"

ROTATION = "sparsity/rotation.safetensors"

# Configurations, tokenizers, templates, indices and weights, whatever a family calls them.
_READ_SUFFIXES = (".safetensors", ".json", ".model", ".tiktoken", ".jinja", ".codes", ".tokenizer")

_TEMPLATES = "additional_chat_templates"

_READ_NAMES = ("vocab.txt", "merges.txt", "dict.txt")


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
    """SHA-256 over the files of a model folder that it, its tokenizer, or what is made of it is
    read from: weights wherever the index has them, configurations, vocabularies, templates, masks
    and rotations.

    A file that only describes (README, licence), weights that are never read (pickle) and hidden
    folders do not count. In the Hub's cache the commit counts, whatever else of the model has been
    downloaded there.

    Cost: reads all of it.
    """
    if reference := hub_reference(folder):
        return hashlib.sha256(reference.encode()).hexdigest()
    names = {path.name for path in folder.iterdir() if _is_read(path)} | {MASKS, ROTATION}
    names |= {f"{_TEMPLATES}/{path.name}" for path in folder.glob(f"{_TEMPLATES}/*.jinja")}
    for index in folder.glob("*.safetensors.index.json"):
        # What is no index counts by its bytes; whoever reads the weights says what is wrong.
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            names |= {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    digest = hashlib.sha256()
    for name in sorted(names):
        if (path := folder / name).is_file():
            digest.update(f"{name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _is_read(path: Path) -> bool:
    is_kind = path.suffix in _READ_SUFFIXES or path.name in _READ_NAMES
    return is_kind and not path.name.startswith(".")


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


KEPT = "kept_layers"
"""entry of the provenance: the layers of the dense model that are left, in order"""


def kept_layers(folder: Path) -> list[int] | None:
    """Layers of the dense model that a model folder still has; None where none was dropped."""
    return (read_sparsity(folder) or {}).get("provenance", {}).get(KEPT)


def facts_of_dense(source: Path, dense: Path, source_sha256: str) -> dict[str, Any]:
    """Entries for the provenance of a model made from `source`: which dense model it comes from.

    Args:
        source: the dense model, or what is left of it after layers were dropped.
        dense: the dense model.
        source_sha256: fingerprint of `source`.
    """
    if source == dense:
        return {"dense_path": str(dense.resolve()), "dense_sha256": source_sha256}
    return {
        "dense_path": str(dense.resolve()),
        "dense_sha256": model_fingerprint(dense),
        KEPT: kept_layers(source),
    }


def write_sparsity(
    folder: Path,
    masks: Mapping[str, Any],
    pattern: str,
    method: str,
    provenance: dict[str, Any],
) -> None:
    """Describe the zeros of a model folder, whose weights are written already: pattern, mask hash
    per layer, where it came from, and what of it stays dense."""
    # Here: the rest of the file is read where torch is not loaded.
    from sparsify.masks.storage import mask_digest

    layers, num_pruned, num_masked = {}, 0, 0
    for name in sorted(masks):
        mask = masks[name]  # one at a time: they may come from a file
        num_kept = int(mask.sum())
        layers[name] = {
            "shape": list(mask.shape),
            "num_kept": num_kept,
            "keep_mask_sha256": mask_digest(mask),
        }
        num_pruned += mask.numel() - num_kept
        num_masked += mask.numel()
    dense = _dense_weights(folder, masks)
    value = {
        "format": "twofour-sparsity", "version": 1, "pattern": pattern, "method": method,
        "provenance": provenance, "layers": layers,
        "model": {
            "num_weights": num_masked + sum(dense.values()),
            "num_pruned": num_pruned,
            "dense": {name: size for name, size in dense.items() if size},
        },
    }  # fmt: skip
    write_json(folder / SPARSITY, value)


def _dense_weights(folder: Path, masks: Mapping[str, Any]) -> dict[str, int]:
    """Name -> number of weights of every tensor that no mask belongs to."""
    from sparsify.models.blocks import layer_places  # torch, as above

    found, named = {}, set(masks)  # asking a file of masks for one would read it
    for name, place in layer_places(folder):
        layer, weight, _ = name.partition(".weight")
        if not (weight and layer in named):
            found[name] = math.prod(place.shape)
    return dict(sorted(found.items()))


def described(sparsity: Mapping[str, Any]) -> str | None:
    """What part of a model its zeros are, in a sentence; None for folders that do not say."""
    model = sparsity.get("model")
    if not isinstance(model, dict) or not model.get("num_weights"):
        return None
    share = model["num_pruned"] / model["num_weights"]
    dense: dict[str, int] = model["dense"]
    if not dense:
        return f"{share:.1%} of all weights are pruned."
    largest = max(dense, key=lambda name: dense[name])
    part = sum(dense.values()) / model["num_weights"]
    return (
        f"{share:.1%} of all weights are pruned; {len(dense)} tensors with {part:.1%} of the "
        f"weights stay dense, the largest of them {largest}."
    )
