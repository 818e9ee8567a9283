"""What a checkpoint's files hold, under the names that its model has for it.

transformers decides while it loads which tensors it leaves out, which it finds under a shorter
name, and whether a head is tied. Here the same is decided from headers, before anything is loaded,
so that a checkpoint that is read tensor by tensor is the model that transformers would make of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.modeling_utils import LoadStateDictInfo

from sparsify.errors import InputError
from sparsify.models.foreign import ForeignFolder
from sparsify.models.layout import Layout, Slice, layout_of
from sparsify.packed.folder import PackedFolder
from sparsify.tensors import tensor_names

_CHUNK_ELEMENTS = 2**24
"""elements of a tensor that are looked at at one time"""


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored."""

    path: Path
    name: str
    """in the file; of a packed layer, its weight's"""
    shape: tuple[int, ...]
    packed: PackedFolder | ForeignFolder | None = None
    """the folder of layers in parts that the tensor comes from, dense"""
    at: Slice | None = None
    """the part that it is of a tensor of all experts; None: all of the tensor"""

    def read(self, dtype: torch.dtype | None) -> Tensor:
        """A copy of it on the CPU; floating point values as `dtype`, None: as they are stored."""
        if self.packed is not None:
            whole = self.packed.dense(self.name, dtype)
            if self.at is None:
                return whole
            return self.at.of(whole).clone(memory_format=torch.contiguous_format)
        with safe_open(self.path, framework="pt") as file:
            if self.at is None:
                tensor = file.get_tensor(self.name)
            else:
                tensor = self.at.of(file.get_slice(self.name))
            is_cast = dtype is not None and tensor.is_floating_point()
            return tensor.to(
                dtype if is_cast else tensor.dtype, copy=True, memory_format=torch.contiguous_format
            )


@dataclass
class Stored:
    """A checkpoint's tensors as its model takes them."""

    places: dict[str, Place]
    """the model's name -> where its value is"""
    ignored: list[str] = field(default_factory=list)
    """tensors of the files that are no part of the model and that transformers passes over"""
    foreign: list[str] = field(default_factory=list)
    """other tensors of the files that are no part of the model"""
    untied: list[str] = field(default_factory=list)
    """weights with values of their own, though the configuration says that they are tied"""

    def remarks(self) -> list[str]:
        """What is left out, and what is not as the configuration says, a sentence each."""
        said = []
        if self.untied:
            said.append(
                f"{self.untied[0]} is stored with values of its own though config.json says "
                "tie_word_embeddings: it is kept as it is, and models made from this one say "
                "tie_word_embeddings=false"
            )
        if self.ignored:
            said.append(
                f"{len(self.ignored)} stored tensors are no part of the model, are passed over by "
                f"transformers and left out here, such as {self.ignored[0]}"
            )
        return said


def places_in(paths: list[Path]) -> Iterator[Place]:
    """Every tensor in safetensors files."""
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in tensor_names(file):
                yield Place(path, name, tuple(file.get_slice(name).get_shape()))


def packed_places(folder: PackedFolder | ForeignFolder) -> Iterator[Place]:
    """Every tensor of a folder of layers in parts, as the dense model has it."""
    for name, shape in folder.shapes().items():
        yield Place(folder.folder, name, shape, folder)


def own_places(places: Iterable[Place], layout: Layout) -> Iterator[tuple[str, Place]]:
    """Tensors of files under the model's names, those of all experts a part for each layer."""
    for place in places:
        for name, at in layout.slices(place.name).items():
            if at is None:
                yield name, place
            elif shape := at.fused.part_shape(place.shape):
                yield name, replace(place, shape=shape, at=at)


def stored_tensors(places: Iterable[Place], model: Any, dtype: torch.dtype) -> Stored:
    """Find every tensor of `model` in the files.

    Args:
        places: the tensors of the checkpoint.
        model: a transformers model of its configuration, without weights. Where a head is stored
            that is not equal to the embedding it is said to be tied to, they are untied in it.
        dtype: that weights are cast to; a head that is equal to the embedding in it is tied.

    Cost: where the configuration says tied and both are stored, reads these two.
    """
    known = model.state_dict().keys()
    prefix = f"{model.base_model_prefix}."
    found = Stored({})
    unknown = []
    for name, place in own_places(places, layout_of(model)):
        own = name if name in known or prefix + name not in known else prefix + name
        if own in known:
            found.places[own] = place
        else:
            unknown.append(name)
    # transformers' own rules for names to pass over; it has no public way to ask for them.
    info = LoadStateDictInfo(set(), set(unknown), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    found.foreign = sorted(info.unexpected_keys)
    found.ignored = sorted(set(unknown) - info.unexpected_keys)
    _settle_ties(found, model, dtype)
    return found


def _settle_ties(found: Stored, model: Any, dtype: torch.dtype) -> None:
    """Keep each tied weight once, under the name of the one it is tied to."""
    places = found.places
    for target, source in model.all_tied_weights_keys.items():
        if target not in places:
            continue
        if source not in places:
            places[source] = places.pop(target)
        elif _are_equal(places[source], places[target], dtype):
            del places[target]
        else:
            found.untied.append(target)
    for target in found.untied:
        parent, _, leaf = target.rpartition(".")
        weight = nn.Parameter(
            torch.empty(places[target].shape, dtype=dtype, device="meta"), requires_grad=False
        )
        setattr(model.get_submodule(parent), leaf, weight)
    if found.untied:
        declare_untied(model)


def declare_untied(model: Any) -> None:
    """Have the configuration say that the output layer has a weight of its own.

    What is written then holds both, and whoever loads it ties nothing.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def follow_weights(model: Any) -> bool:
    """`declare_untied` where a model that was loaded has, against its configuration, two weights.

    Returns:
        Whether it has.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    first, last = (getattr(end, "weight", None) for end in ends)
    is_untied = (
        bool(getattr(model.config, "tie_word_embeddings", False))
        and first is not None
        and last is not None
        and first is not last
    )
    if is_untied:
        declare_untied(model)
    return is_untied


def check_stored(
    folder: Path, places: dict[str, Place], dtype: torch.dtype, rank: int = 0, world_size: int = 1
) -> None:
    """Look at the values of a checkpoint, a piece of a tensor in memory at a time.

    Args:
        folder: for the message.
        places: what to look at.
        dtype: that weights are cast to.
        rank, world_size: look at every `world_size`-th tensor, from the `rank`-th on.

    Raises:
        InputError: a value is NaN, or infinite as `dtype`.

    Cost: reads the tensors once; one pass over their values.
    """
    for name in sorted(places)[rank::world_size]:
        place = places[name]
        num_bad = sum(num_not_finite(part.to(dtype)) for part in _pieces(place))
        if num_bad:
            raise not_finite(folder, name, num_bad, math.prod(place.shape), dtype)


def num_not_finite(values: Tensor) -> int:
    """How many are NaN or infinite."""
    if not values.numel() or all(end.isfinite() for end in values.aminmax()):
        return 0  # of numbers alone; NaN would be both ends. Counting takes 15 times as long
    return values.numel() - int(values.isfinite().sum())


def not_finite(
    folder: Path, name: str, num_bad: int, num_values: int, dtype: torch.dtype
) -> InputError:
    """The error of a weight with such values."""
    said = str(dtype).removeprefix("torch.")
    hint = "; float16 ends at 65504, try model.dtype=bfloat16" if said == "float16" else ""
    return InputError(
        f"model folder {folder}: {num_bad} of {num_values} values of {name} are NaN or infinite as "
        f"{said}; use a sound checkpoint{hint}"
    )


def _are_equal(first: Place, second: Place, dtype: torch.dtype) -> bool:
    pairs = zip(_pieces(first), _pieces(second), strict=False)
    return first.shape == second.shape and all(
        torch.equal(one.to(dtype), other.to(dtype)) for one, other in pairs
    )


def _pieces(place: Place) -> Iterator[Tensor]:
    """The floating point values of a tensor, some rows at a time; nothing of another type."""
    if place.packed is not None or place.at is not None:
        whole = place.read(None)
        if whole.is_floating_point():
            yield whole
        return
    with safe_open(place.path, framework="pt") as file:
        if not place.shape:
            values = file.get_tensor(place.name)
            parts: Iterator[Tensor] = iter([values])
        else:
            whole = file.get_slice(place.name)
            row = max(1, math.prod(place.shape[1:]))
            step = max(1, _CHUNK_ELEMENTS // row)
            parts = (whole[start : start + step] for start in range(0, place.shape[0], step))
        for part in parts:
            if not part.is_floating_point():
                return
            yield part
