"""What config.json says of a compressed-tensors checkpoint, in all the places where it was said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.errors import InputError
from sparsify.models.foreign._base import Args

KEYS = ("quantization_config", "compression_config", "sparsity_config")
"""of config.json, by which such a checkpoint describes itself; the last two until 2024"""

_METHODS = ("compressed-tensors", "sparseml")

_STRATEGIES = ("tensor", "channel", "group")

FORMATS = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "marlin-24",
    "sparse-24-bitmask", "sparse-bitmask", "mixed-precision",
)  # fmt: skip
"""that are read; the label mixed-precision means that each group names its own"""

_FIX = "use the original model in float32, bfloat16 or float16"


@dataclass(frozen=True)
class ForeignConfig:
    """How a checkpoint's layers are stored."""

    groups: tuple[tuple[tuple[str, ...], Args], ...]
    """targets of each group, and how it is quantised"""
    formats: tuple[str, ...]
    """all that are named"""
    structure: str | None
    """of the zeros, as the checkpoint says: 2:4, unstructured, 0:0; None where it does not"""

    def args_of(self, layer: str) -> Args | None:
        """How a layer is quantised, by the first group that names it, else its kind, `Linear`."""
        for by_name in (True, False):
            for targets, args in self.groups:
                if any(_is_of(layer, target, by_name) for target in targets):
                    return args
        return None


def find_config(raw: Mapping[str, Any], where: str) -> ForeignConfig | None:
    """What the object of a config.json says, None where it is no such checkpoint's.

    Raises:
        InputError: it is one that cannot be read: another format, activations that are rotated,
            or a kind of scale that is not known.
    """
    found: dict[str, Any] = next(
        (raw[key] for key in KEYS[:2] if isinstance(raw.get(key), dict)), {}
    )
    method = found.get("quant_method", "compressed-tensors")
    if method not in _METHODS:
        return None
    sparsity = found.get("sparsity_config") or raw.get("sparsity_config") or {}
    if not found and not sparsity:
        return None
    groups = found.get("config_groups") or {}
    formats = [found.get("format"), sparsity.get("format")]
    formats += [group.get("format") for group in groups.values()]
    named = tuple(dict.fromkeys(name for name in formats if name))
    for name in named:
        if name not in FORMATS:
            raise InputError(
                f"{where}: compressed-tensors format {name!r} cannot be read here (these can: "
                f"{', '.join(FORMATS)}); {_FIX}"
            )
    if (found.get("transform_config") or {}).get("config_groups"):
        raise InputError(
            f"{where}: transform_config: the model turns its activations while it runs; {_FIX}"
        )
    try:
        read = tuple(
            (tuple(group["targets"]), _args(group["weights"], where, name))
            for name, group in groups.items() if group.get("weights")
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise InputError(
            f"{where}: config_groups is not as compressed-tensors writes it ({cause}); copy or "
            "download the file again"
        ) from None
    return ForeignConfig(read, named, sparsity.get("sparsity_structure"))


def _args(weights: Mapping[str, Any], where: str, group: str) -> Args:
    """One group's."""
    args = Args(
        int(weights["num_bits"]), str(weights.get("type", "int")),
        bool(weights.get("symmetric", True)),
        str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")),
        None if weights.get("group_size") in (None, -1) else int(weights["group_size"]),
    )  # fmt: skip
    is_known = (args.type, args.num_bits) in (("int", 4), ("int", 8), ("float", 8))
    if not is_known or args.strategy not in _STRATEGIES:
        raise InputError(
            f"{where}: {group}: {args.type} of {args.num_bits} bits, strategy {args.strategy}, "
            f"cannot be read here (int of 4 or 8, float of 8; {', '.join(_STRATEGIES)}); {_FIX}"
        )
    if args.strategy == "group" and not (args.group_size or 0) > 0:
        raise ValueError(f"strategy group with group_size {weights.get('group_size')!r}")
    return args


def _is_of(layer: str, target: str, by_name: bool) -> bool:
    if not by_name:
        return target == "Linear"
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return target == layer
