"""A run's options as a recipe, which `read_recipe` reads back to the same options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from jobs.cli.recipe.names import regex_of
from jobs.cli.recipe.read import read_text
from jobs.cli.recipe.text import OWN

NAME = "recipe.yaml"
"""of the file beside a model"""

_HEAD = """\
# How this model was made, as a recipe of llm-compressor; run.recipe=FILE reads it back.
# mask_structure counts the pruned weights. What llm-compressor has no key for is under {own}.
"""

_PRUNE = {"sparsegpt": "SparseGPTModifier", "wanda": "WandaPruningModifier",
          "magnitude": "MagnitudePruningModifier"}  # fmt: skip

_SCHEMES = {"int4": (4, "int"), "int8": (8, "int"), "w8a8": (8, "int"), "fp8": (8, "float")}


def recipe_text(
    stages: Sequence[str], options: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Mapping[str, Any]],
) -> str:  # fmt: skip
    """The recipe of a model.

    Args:
        stages: of prune, distill and quantize those that it went through, in order.
        options: group -> option -> value, of these stages at least.
        defaults: the same of a run that was told nothing; what differs from it is written.
    """
    modifiers: dict[str, Any] = {}
    if "prune" in stages:
        modifiers |= _prune(options["prune"])
    if "quantize" in stages and options["quantize"]["scheme"] in _SCHEMES:
        modifiers |= _quantize(options["quantize"])
    body: dict[str, Any] = {"default_stage": {"default_modifiers": modifiers}} if modifiers else {}
    said = read_text(yaml.safe_dump(body, sort_keys=False)).options if body else {}
    own: dict[str, Any] = {"stages": list(stages)}
    for stage in stages:
        rest = {
            key: value for key, value in options[stage].items()
            if said.get(f"{stage}.{key}", defaults[stage].get(key)) != value
        }  # fmt: skip
        if rest:
            own[stage] = rest
    text = yaml.safe_dump({**body, OWN: own}, sort_keys=False, allow_unicode=True, width=100)
    return _HEAD.format(own=OWN) + text


def _prune(group: Mapping[str, Any]) -> dict[str, Any]:
    args: dict[str, Any] = {}
    name = _PRUNE.get(group["method"], "TwofourPruningModifier")
    if name not in _PRUNE.values():
        args["method"] = group["method"]
    kind, _, share = group["pattern"].partition(":")
    if kind == "unstructured":
        args |= {"sparsity": float(share), "mask_structure": "0:0"}
    else:
        pruned = int(share) - int(kind)
        args |= {"sparsity": pruned / int(share), "mask_structure": f"{pruned}:{share}"}
    if name in ("SparseGPTModifier", "TwofourPruningModifier"):
        args |= {"block_size": group["block_size"], "dampening_frac": group["damping"]}
    return {name: args | _which(group)}


def _which(group: Mapping[str, Any]) -> dict[str, Any]:
    """Targets and ignore; the head stays as it is in any run."""
    return {"targets": ["Linear"],
            "ignore": ["re:.*lm_head", *(regex_of(glob) for glob in group["skip"])]}  # fmt: skip


def _quantize(group: Mapping[str, Any]) -> dict[str, Any]:
    bits, kind = _SCHEMES[group["scheme"]]
    weights = {"num_bits": bits, "type": kind, "symmetric": group["symmetric"]}
    size = group["group_size"]
    size = 128 if size is None and group["scheme"] == "int4" else size
    is_group = size not in (None, -1)
    weights |= {"strategy": "group", "group_size": size} if is_group else {"strategy": "channel"}
    inputs = None
    if group["scheme"] in ("w8a8", "fp8"):
        inputs = {
            "num_bits": 8,
            "type": kind,
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    part = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    args: dict[str, Any] = {"config_groups": {"group_0": part}}
    if group["method"] == "gptq":
        args |= {"block_size": group["block_size"], "dampening_frac": group["damping"]}
    args["ignore"] = _which(group)["ignore"]
    return {"GPTQModifier" if group["method"] == "gptq" else "QuantizationModifier": args}
