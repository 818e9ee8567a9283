"""What a packed folder says of its layers, and the dtype and shape of every tensor that follows.

Shape suffixes: O output features (rows), I input features (columns), K survivors of a row, G groups
of columns that share a scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify.errors import InputError
from sparsify.pattern import Pattern, check_divides

METHOD = "twofour"
"""`quant_method` in config.json"""

FORMAT = "twofour-packed"

VERSION = 2

EXPORT_AGAIN = "export the model again"

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
"""bytes of an element, by the dtype's name in a safetensors header"""

FLOATS = ("F32", "BF16", "F16")
"""what the type `float` is stored in"""

TYPES = ("float", "fp8", "int", "nf4")

CODE_BITS = {"int": (4, 8), "nf4": (4,)}

ACTIVATIONS = ("int8", "fp8")


@dataclass(frozen=True)
class Scheme:
    """How the surviving weights of a layer are stored.

    Raises:
        InputError: a type or a number that the format does not have.
    """

    type: str = "float"
    """float (values as they are), fp8 (e4m3, a scale a row), int (codes and scales), nf4"""
    bits: int | None = None
    """of a code: 4 or 8 for int, 4 for nf4; None for the others"""
    group_size: int | None = None
    """columns of the dense row that share a scale, of int and nf4; None for the others"""
    symmetric: bool = True
    """of int: without `weight_zeros`"""
    activations: str | None = None
    """what a layer's input may be rounded to at run time, with a scale for every token: int8 beside
    symmetric int of 8 bits, fp8 beside fp8; None: it stays as it is"""

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise InputError(f"type {self.type!r}: not one of {', '.join(TYPES)}")
        if self.type in CODE_BITS:
            if self.bits not in CODE_BITS[self.type]:
                known = " or ".join(map(str, CODE_BITS[self.type]))
                raise InputError(f"bits={self.bits!r}: codes of type {self.type} have {known}")
            if not isinstance(self.group_size, int) or self.group_size < 1:
                raise InputError(f"group_size={self.group_size!r}: a whole number from 1 on")
        elif self.bits is not None or self.group_size is not None:
            raise InputError(f"type {self.type}: has neither bits nor group_size")
        if self.type != "int" and not self.symmetric:
            raise InputError(f"type {self.type}: has no zeros, so it is symmetric")
        if self.activations is not None:
            own = "int8" if (self.type, self.bits) == ("int", 8) and self.symmetric else self.type
            if self.activations != own or own not in ACTIVATIONS:
                raise InputError(f"activations={self.activations!r}: do not fit {self.name}")

    @property
    def name(self) -> str:
        """Under which layers refer to it."""
        found = f"int{self.bits}" if self.type == "int" else self.type
        found += "" if self.group_size is None else f"-g{self.group_size}"
        found += "" if self.symmetric else "-asym"
        return found + ("" if self.activations is None else f"-a-{self.activations}")

    @property
    def has_codes(self) -> bool:
        """Whether scales belong to what is stored."""
        return self.type != "float"

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        found: dict[str, Any] = {"type": self.type}
        if self.type in CODE_BITS:
            found |= {"bits": self.bits, "group_size": self.group_size}
        if self.type == "int":
            found["symmetric"] = self.symmetric
        return found if self.activations is None else {**found, "activations": self.activations}


@dataclass(frozen=True)
class Layer:
    """One packed layer."""

    shape: tuple[int, int]
    """(O, I) of the dense weight"""
    scheme: Scheme
    pattern: Pattern

    @property
    def num_kept(self) -> int:
        """K of an N:M pattern."""
        return self.pattern.num_kept(self.shape[1])

    @property
    def num_groups(self) -> int:
        """G: scales of a row; the last group of columns may be short."""
        size = self.scheme.group_size
        return 1 if size is None else -(-self.shape[1] // size)

    def parts(
        self, float_dtype: str = "F32", num_survivors: int | None = None
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype (as safetensors names it) and shape of every tensor, by the last part of its name.

        Args:
            float_dtype: of values that are stored as they are.
            num_survivors: of the whole layer; unstructured patterns need it.
        """
        scheme, (num_rows, num_columns) = self.scheme, self.shape
        eight = "I8" if scheme.symmetric else "U8"
        dtype = {"float": float_dtype, "fp8": "F8_E4M3"}.get(scheme.type, "U8")
        dtype = eight if scheme.bits == 8 else dtype
        per_byte = 2 if scheme.bits == 4 else 1
        if self.pattern.is_structured:
            width = -(-self.num_kept * index_bits(self.pattern) // 8)
            shape: tuple[int, ...] = (num_rows, -(-self.num_kept // per_byte))
            found = {"weight": (dtype, shape), "weight_indices": ("U8", (num_rows, width))}
        else:
            assert num_survivors is not None, "the bitmask says how many"
            bitmask = ("U8", (num_rows, -(-num_columns // 8)))
            found = {
                "weight": (dtype, (-(-num_survivors // per_byte),)), "weight_bitmask": bitmask,
            }  # fmt: skip
        if scheme.has_codes:
            scale = "F32" if scheme.type == "fp8" else "F16"
            found["weight_scales"] = (scale, (num_rows, self.num_groups))
        if not scheme.symmetric:
            found["weight_zeros"] = ("U8", (num_rows, self.num_groups))
        return found


def index_bits(pattern: Pattern) -> int:
    """Bits of a survivor's column within its group: ceil(log2 m)."""
    return (pattern.m - 1).bit_length()


def part_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor."""
    return math.prod(shape) * ITEM_BYTES[dtype]


@dataclass(frozen=True)
class Contents:
    """`quantization_config` of a packed folder's config.json: which layers are packed, and how."""

    pattern: Pattern
    layers: Mapping[str, Layer] = field(default_factory=dict)
    """layer name -> how it is stored; every other module is dense"""

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        schemes = {layer.scheme.name: layer.scheme.to_dict() for layer in self.layers.values()}
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "pattern": str(self.pattern),
            "schemes": {name: schemes[name] for name in sorted(schemes)},
            "layers": {
                name: {"scheme": layer.scheme.name, "shape": list(layer.shape)}
                for name, layer in self.layers.items()
            },
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str) -> Contents:
        """Read it.

        Args:
            value: the JSON object.
            where: what it stands in, for messages.

        Raises:
            InputError: of another version, or anything that the format does not have.
        """
        check_version(value.get("version"), where)
        expected = {"quant_method", "version", "pattern", "schemes", "layers"}
        if found := sorted(value.keys() ^ expected):
            problem = "unknown" if found[0] in value else "missing"
            raise InputError(f"{where}: {found[0]!r} is {problem}; {EXPORT_AGAIN}")
        try:
            pattern = Pattern.parse(value["pattern"])
            schemes = {name: Scheme(**entry) for name, entry in value["schemes"].items()}
            layers = {}
            for name, entry in value["layers"].items():
                num_rows, num_columns = map(int, entry["shape"])
                check_divides(name, num_columns, pattern)
                layers[name] = Layer((num_rows, num_columns), schemes[entry["scheme"]], pattern)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            cause = " ".join(str(error).split())
            raise InputError(
                f"{where}: not as the format has it ({cause}); {EXPORT_AGAIN}"
            ) from None
        return cls(pattern, layers)


def check_version(version: Any, where: str) -> None:
    """InputError unless it is this version of the format."""
    if type(version) is int and version > VERSION:
        raise InputError(
            f"{where}: version {version} of the packed format, this program reads version "
            f"{VERSION}; use a newer twofour"
        )
    if type(version) is not int or version != VERSION:
        raise InputError(
            f"{where}: version {version!r} of the packed format, this program reads version "
            f"{VERSION}; {EXPORT_AGAIN}"
        )


def packed_layers(folder: Path) -> Mapping[str, Layer]:
    """The packed layers of a model folder, by its config.json; none where it is not packed."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}  # whoever reads the model says what is wrong with it
    if not is_packed_config(config):
        return {}
    return Contents.from_dict(config["quantization_config"], str(folder / "config.json")).layers


def is_packed_config(config: Any) -> bool:
    """Whether the object of a config.json is a packed model's."""
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(found, dict) and found.get("quant_method") == METHOD
