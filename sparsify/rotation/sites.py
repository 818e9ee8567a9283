"""Everything in a model that touches its residual stream, as far as a rotation has to know it.

Works from the module tree and one traced forward, never from the name of a model family. Shape
suffixes: D hidden size, T tokens, I input features of a writer, H key-value heads, Q query heads of
one of them, K width of a head.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import InputError
from sparsify.models.calls import evaluating
from sparsify.models.experts import expert_layers
from sparsify.models.structure import find_blocks, linears_of
from sparsify.models.watch import watch_inputs, watch_outputs


@dataclass(frozen=True)
class NormSite:
    """An RMSNorm on the residual stream and the linears that read its output."""

    name: str
    norm: nn.Module
    offset: float
    """the gain is weight + offset: 0, or 1 in Gemma's way of writing it"""
    readers: dict[str, nn.Linear]


@dataclass(frozen=True)
class ValueSite:
    """The value and output projections of one attention."""

    value: nn.Linear
    output: nn.Linear
    num_kv_heads: int
    head_dim: int

    @property
    def num_queries(self) -> int:
        """Query heads that read one key-value head."""
        return self.output.in_features // (self.num_kv_heads * self.head_dim)


@dataclass(frozen=True)
class RotationSites:
    """Everything in a model that touches its residual stream."""

    embedding: nn.Embedding
    head: nn.Linear
    norms: list[NormSite]
    """in order of execution; the last one feeds the head"""
    writers: dict[str, nn.Linear]
    """linears whose output is added to the stream"""
    values: list[ValueSite] = field(default_factory=list)

    def without(self, names: Collection[str]) -> RotationSites:
        """The same but for these linears, which are turned with the others and not looked at."""
        norms = [
            replace(site, readers={n: x for n, x in site.readers.items() if n not in names})
            for site in self.norms
        ]
        writers = {name: x for name, x in self.writers.items() if name not in names}
        return replace(self, norms=norms, writers=writers)


def find_rotation_sites(model: nn.Module) -> RotationSites:
    """Norms, readers, writers and heads, from the module tree and one forward of four tokens.

    Readers are the linears fed with the output of a norm of the stream's width; writers the other
    linears of that output width in the decoder blocks. Value and output projections are those
    named v_proj and o_proj of one module.

    Raises:
        InputError: a parameter that this picture has no place for, or a norm that is no RMSNorm
            or feeds no linear (norms after the layer, as in Gemma 2): rotations cannot be folded.
    """
    name = type(model).__name__
    embedding, head = _ends(model)
    width = embedding.weight.shape[1]
    _, blocks = find_blocks(model)
    traced, readers_of = _trace(model, head, width)
    norms = []
    for norm_name, norm in traced.items():
        readers = readers_of.get(norm_name, {})
        if not readers:
            raise InputError(
                f"rotation: {norm_name} of {name} feeds no linear layer, so its gain cannot be "
                "folded into one; leave rotation out for this model"
            )
        norms.append(NormSite(norm_name, norm, _gain_offset(norm_name, norm, width), readers))
    if not norms or head not in norms[-1].readers.values():
        raise InputError(
            f"rotation: the output layer of {name} does not read the last norm; leave rotation out "
            "for this model"
        )
    read = {id(linear) for site in norms for linear in site.readers.values()}
    inside = {id(linear) for block in blocks for linear in linears_of(block).values()}
    writers = {
        writer_name: module
        for writer_name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside - read
        and module.out_features == width
    }  # fmt: skip
    sites = RotationSites(embedding, head, norms, writers, _value_sites(model, blocks))
    _require_known(model, sites, blocks, width)
    return sites


def _ends(model: Any) -> tuple[nn.Embedding, nn.Linear]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise InputError(
            f"rotation: {type(model).__name__} has no nn.Embedding before and nn.Linear after its "
            "blocks; leave rotation out for this model"
        )
    return embedding, head


def _trace(
    model: nn.Module, head: nn.Linear, width: int
) -> tuple[dict[str, nn.Module], dict[str, dict[str, nn.Linear]]]:
    """Norms of the given width in order of execution, and the linears fed with each one's output.

    A linear is fed with a norm's output when its input lies in the same memory, which is kept
    until the end, so that nothing else can come to lie there; views count.
    """
    norms: dict[str, nn.Module] = {}
    readers: dict[str, dict[str, nn.Linear]] = {}
    source: dict[int, str] = {}
    kept: list[Tensor] = []

    def after_norm(name: str, output: Tensor) -> None:
        kept.append(output)
        norms[name] = after[name]
        source[output.untyped_storage().data_ptr()] = name

    def before_linear(name: str, value: Tensor) -> None:
        norm = source.get(value.untyped_storage().data_ptr())
        if norm is not None:
            readers.setdefault(norm, {})[name] = before[name]

    before = linears_of(model)
    after = {
        name: module
        for name, module in model.named_modules()
        if name not in before and _is_norm(module, width)
    }
    with (
        evaluating(model),
        watch_inputs(before, before_linear),
        watch_outputs(after, after_norm),
        torch.no_grad(),
    ):
        ids = torch.arange(4, device=head.weight.device)[None] % head.out_features
        model(input_ids=ids, use_cache=False)
    return norms, readers


def _is_norm(module: nn.Module, width: int) -> bool:
    """A leaf with one gain per feature of the stream."""
    if isinstance(module, nn.Embedding) or next(module.children(), None) is not None:
        return False
    return any(parameter.shape == (width,) for parameter in module.parameters(recurse=False))


@torch.no_grad()
def _gain_offset(name: str, norm: nn.Module, width: int) -> float:
    """0 or 1, whichever added to the weight is the gain; found by calling the norm."""
    parameters = dict(norm.named_parameters(recurse=False))
    if set(parameters) == {"weight"}:
        weight_D = parameters["weight"]
        probe_D = torch.linspace(0.5, 2.0, width, dtype=torch.float64)
        found_D = norm(probe_D.to(weight_D)[None, None])[0, 0].double().cpu()
        unit_D = probe_D * probe_D.square().mean().rsqrt()
        for offset in (0.0, 1.0):
            expected_D = unit_D * (weight_D.double().cpu() + offset)
            # Wide enough for bfloat16 and for the norm's epsilon.
            if torch.allclose(found_D, expected_D, rtol=0.03, atol=1e-3):
                return offset
    raise InputError(
        f"rotation: {name} ({type(norm).__name__}) is no RMSNorm with a gain alone; a LayerNorm's "
        "mean and bias do not rotate; leave rotation out for this model"
    )


def _value_sites(model: nn.Module, blocks: nn.ModuleList) -> list[ValueSite]:
    sites = []
    for block in blocks:
        for module in block.modules():
            value, output = getattr(module, "v_proj", None), getattr(module, "o_proj", None)
            head_dim = getattr(module, "head_dim", None)
            if not (isinstance(value, nn.Linear) and isinstance(output, nn.Linear) and head_dim):
                continue
            num_kv_heads = value.out_features // head_dim
            if num_kv_heads and output.in_features % (num_kv_heads * head_dim) == 0:
                sites.append(ValueSite(value, output, num_kv_heads, head_dim))
    return sites


def _require_known(
    model: nn.Module, sites: RotationSites, blocks: nn.ModuleList, width: int
) -> None:
    """InputError for a parameter that would have to be rotated and is not."""
    known = {id(p) for site in sites.norms for p in site.norm.parameters()}
    ends = (sites.embedding, sites.head)
    # A router is between the stream and experts, whose layers turn with no norm's readers.
    routed = {f"{at}.{name}" for at, block in enumerate(blocks) for name in expert_layers(block)}
    inner = [m for name, m in linears_of(blocks).items() if name not in routed]
    for module in [*ends, *inner]:
        known |= {id(parameter) for parameter in module.parameters()}
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    for name, parameter in model.named_parameters():
        # Gains of single heads, as Qwen 3 has them, never meet the stream.
        is_inner = id(parameter) in inside and parameter.ndim == 1 and len(parameter) != width
        if id(parameter) not in known and not is_inner:
            raise InputError(
                f"rotation: {name} of {type(model).__name__}, shape {tuple(parameter.shape)}, is "
                "no part of a pre-norm decoder of linear layers; leave rotation out for this model"
            )
