"""Takes the fused experts of transformers apart, into the linear layers of `models.experts`.

transformers holds the experts of many families as parameters of three dimensions (experts, rows,
columns) in one fused module. Here such a module is replaced by a linear layer for each expert and
projection, so that an expert's layers are watched, solved, masked, trained, packed, read and
written like any other linear layer.

Most checkpoints hold one matrix for each expert and projection, which transformers merges as it
loads and splits as it saves: these names the linears get. Others hold the fused parameters; how
these are made of the linears is left with the model (`models.layout`), for whoever reads and writes
files. Which of the two a family does is asked of transformers itself, by having it save small
marked tensors; a family that does neither keeps the fused module, and so do families whose experts
compute in a way of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightRenaming,
    revert_weight_conversion,
)
from transformers.integrations.moe import _default_apply_gate

from sparsify.models.experts import Expert, RoutedExperts, ScaledExperts
from sparsify.models.layout import Fused, Layout, Slice, set_layout


def unfuse_experts(model: nn.Module) -> None:
    """Replace fused experts by linear layers in place, wherever it is known how the family's
    checkpoints have them.

    Where they have them one by one, modules on the way to them get the names of the checkpoints too
    (`block_sparse_moe` for Mixtral's `mlp`), under which the model's state is then stored; their
    old names still find them. Where they are stored fused, `models.layout.layout_of` says how.

    Args:
        model: of transformers; its weights may be on the meta device. Another is left as it is.

    Cost: a copy of the experts' weights, one layer of the model at a time.
    """
    found = {path: f for path, module in model.named_modules() if (f := _fused_module(module))}
    if not found:
        return
    names, stored = _stored_names(model, found)
    fused: dict[str, Fused] = {}
    for path, of_experts in names.items():
        for name, stored_name in stored.get(path, {}).items():
            fused[stored_name] = _layout_of(path, found[path], name, stored_name, of_experts)
        model.set_submodule(path, _split(model, found[path], of_experts))
    if fused:
        set_layout(model, Layout(fused, _renamed(model)))
    elif names:
        _take_stored_names(model)


@dataclass(frozen=True)
class _FusedModule:
    """A module of fused experts, and how its parameters are made."""

    module: Any
    parameters: dict[str, tuple[str, ...]]
    """name -> the projections whose rows it holds, in this order"""
    transposed: frozenset[str]
    """those whose matrices are stored transposed"""
    is_interleaved: bool
    num_experts: int
    is_flat: bool = False
    """whether experts are one below the other, in matrices"""


_ROLES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""projection -> name of its linear, where the family's checkpoints have none"""


def _fused_module(module: Any) -> _FusedModule | None:
    """What is known of fused experts; None of other modules, and where it is not all known."""
    has_gate, has_bias, is_transposed, is_concatenated = True, False, True, True
    if type(module).__name__ == "DbrxExperts":
        roles: dict[str, tuple[str, ...]]
        roles = {"mlp.w1": ("gate",), "mlp.v1": ("up",), "mlp.w2": ("down",)}
        transposed = frozenset(["mlp.w2"])
        return _FusedModule(module, roles, transposed, False, module.num_experts, is_flat=True)
    if hasattr(module, "is_concatenated"):  # set by transformers' decorator of fused experts
        has_gate, has_bias = module.has_gate, module.has_bias
        is_transposed, is_concatenated = module.is_transposed, module.is_concatenated
        if getattr(module, "has_post_expert_norm", False):  # transformers 5.19 does not say it
            return None
    elif type(module).__name__ != "Llama4TextExperts":
        return None
    parameters: dict[str, tuple[str, ...]]
    parameters = {"gate_up_proj": ("gate", "up")} if has_gate else {"up_proj": ("up",)}
    parameters["down_proj"] = ("down",)
    matrices = frozenset(parameters if is_transposed else ())
    if has_bias:
        parameters |= {f"{name}_bias": roles for name, roles in parameters.items()}
    held = {n: p.ndim for n, p in (*module.named_parameters(), *module.named_buffers())}
    if held != {name: 2 if name.endswith("_bias") else 3 for name in parameters}:
        return None
    count = len(module.down_proj)
    return _FusedModule(module, parameters, matrices, not is_concatenated, count)


def _stored_names(
    model: nn.Module, found: Mapping[str, _FusedModule]
) -> tuple[dict[str, list[dict[str, str]]], dict[str, dict[str, str]]]:
    """How the family's checkpoints store experts.

    Returns:
        Path of fused experts -> for each expert its projections and the names of their linears; of
        those that are stored as one matrix each, or fused. And path of the latter -> their
        parameters, and the names under which these are stored.
    """
    marks: dict[str, Tensor] = {}  # of real memory, wherever the model is being made
    meaning: list[tuple[str, str, int, str]] = []
    for path, fused in found.items():
        for name, roles in fused.parameters.items():
            first = len(meaning)
            numbers = range(fused.num_experts)
            meaning += [(path, name, index, role) for index in numbers for role in roles]
            codes = torch.arange(first, len(meaning), device="cpu")
            if not fused.is_flat:
                codes = codes.view(-1, len(roles))
            # Two columns, so that what is transposed on the way is not taken for what is not.
            is_bias = name.endswith("_bias")
            marks[f"{path}.{name}"] = codes if is_bias else torch.stack([codes, codes], -1)
    one_by_one: dict[str, list[dict[str, str]]] = {
        path: [{} for _ in range(fused.num_experts)] for path, fused in found.items()
    }
    whole: dict[str, dict[str, str]] = {path: {} for path in found}
    for stored_name, mark in _as_stored(model, marks).items():
        path, name, index, role = meaning[int(mark.flatten()[0])]
        match = re.fullmatch(r".*\.(\d+)\.(\w+)\.weight", stored_name)
        if match is not None and mark.shape == (1, 2) and int(match[1]) == index:
            one_by_one[path][index][role] = match[2]
        elif torch.equal(mark, marks[f"{path}.{name}"]):
            whole[path][name] = stored_name
    names: dict[str, list[dict[str, str]]] = {}
    stored: dict[str, dict[str, str]] = {}
    for path, fused in found.items():
        wanted = {role for roles in fused.parameters.values() for role in roles}
        is_plain = not fused.transposed and not fused.is_interleaved
        has_biases = any(name.endswith("_bias") for name in fused.parameters)
        if all(wanted == of.keys() for of in one_by_one[path]) and is_plain and not has_biases:
            names[path] = one_by_one[path]
        elif whole[path].keys() == fused.parameters.keys():
            names[path] = [{role: _ROLES[role] for role in wanted}] * fused.num_experts
            stored[path] = whole[path]
    return names, stored


def _layout_of(
    path: str, fused: _FusedModule, name: str, stored_name: str, names: list[dict[str, str]]
) -> Fused:
    """How a stored parameter is made of the linears that take its place."""
    leaf = "bias" if name.endswith("_bias") else "weight"
    roles = fused.parameters[name]
    num_rows = len(fused.module.get_parameter(name)) // fused.num_experts
    return Fused(
        stored_name,
        tuple(
            tuple(f"{path}.{index}.{of_roles[role]}.{leaf}" for role in roles)
            for index, of_roles in enumerate(names)
        ),
        is_transposed=name in fused.transposed,
        is_interleaved=fused.is_interleaved and len(roles) > 1,
        num_rows=num_rows if fused.is_flat else None,
    )


def _as_stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model as transformers saves a model of this family that was made anew."""
    key = "_weight_conversions"  # how its own files were named; what counts are the family's
    held = model.__dict__.pop(key, None)
    try:
        return dict(revert_weight_conversion(model, dict(tensors)))  # type: ignore[arg-type]
    finally:
        if held is not None:
            model.__dict__[key] = held


def _renamed(model: nn.Module) -> dict[str, str]:
    """Tensors that the family's checkpoints have under other names -> these."""
    # In the order in which transformers undoes them as it saves.
    conversions = get_model_conversion_mapping(model, add_legacy=False)[::-1]  # type: ignore[arg-type]
    plain = [c for c in conversions if isinstance(c, WeightRenaming)]
    undo: Any = [c.reverse_transform() for c in plain if not isinstance(c, PrefixChange)]
    found = {}
    for key in model.state_dict():
        stored_key = key
        for renaming in undo:
            stored_key, _ = renaming.rename_source_key(stored_key)
        if stored_key != key:
            found[key] = stored_key
    return found


def _take_stored_names(model: nn.Module) -> None:
    """Give the modules around experts the names that they have in the family's checkpoints, where
    these differ in single words inside a block; nothing where it is not as simple."""
    renames: dict[str, str] = {}
    for key, stored_key in _renamed(model).items():
        own, stored = key.split("."), stored_key.split(".")
        if len(own) != len(stored) or own[-1] != stored[-1]:
            continue
        for depth, (word, other) in enumerate(zip(own, stored, strict=True)):
            if word != other and any(before.isdigit() for before in own[:depth]):
                renames[".".join(own[: depth + 1])] = other
    for path in sorted(renames, key=len, reverse=True):  # inner ones first
        parent_name, _, word = path.rpartition(".")
        parent = model.get_submodule(parent_name)
        children = {renames[path] if n == word else n: m for n, m in parent._modules.items()}
        if len(children) == len(parent._modules):
            parent.__dict__[word] = parent._modules[word]  # the family's code asks for it
            parent._modules.clear()
            parent._modules.update(children)


def _split(model: Any, fused: _FusedModule, names: list[dict[str, str]]) -> RoutedExperts:
    """The linears of fused experts; the fused weights are let go."""
    layouts = {name: _layout_of("", fused, name, name, names) for name in fused.parameters}
    held = {name: _pop(fused.module, name) for name in fused.parameters}
    experts = []
    for index, of_roles in enumerate(names):
        parts: dict[tuple[str, str], Tensor] = {}
        for name, roles in fused.parameters.items():
            leaf = "bias" if name.endswith("_bias") else "weight"
            for number, role in enumerate(roles):
                parts[role, leaf] = Slice(layouts[name], index, number).of(held[name])
        linears = {
            role: (of_roles[role], _linear(parts[role, "weight"], parts.get((role, "bias"))))
            for role in _ROLES
            if role in of_roles
        }
        experts.append(Expert(linears, _Mixer(fused)))
    if type(fused.module).__name__ == "Llama4TextExperts":
        return ScaledExperts(experts, model.config.get_text_config().num_experts_per_tok)
    return RoutedExperts(experts)


def _pop(module: nn.Module, name: str) -> Any:
    """Take a parameter out of a module."""
    parent, _, leaf = name.rpartition(".")
    return module.get_submodule(parent)._parameters.pop(leaf)


def _linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    has_bias = bias_O is not None
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], has_bias, device="meta")
    for name, part in (("weight", weight_OI), ("bias", bias_O)):
        if part is not None:
            copy = part.detach().clone(memory_format=torch.contiguous_format)
            setattr(linear, name, nn.Parameter(copy, requires_grad=part.requires_grad))
    return linear


class _Mixer:
    """The fused module's own rule between its projections."""

    def __init__(self, fused: _FusedModule) -> None:
        self._module = fused.module  # without weights
        self._is_interleaved = fused.is_interleaved
        self._is_flat = fused.is_flat

    def __call__(self, gate_TM: Tensor | None, up_TM: Tensor) -> Tensor:
        module = self._module
        own_rule = getattr(type(module), "_apply_gate", _default_apply_gate)
        if self._is_flat:
            mixed: Tensor = module.mlp.activation_fn(gate_TM) * up_TM
        elif gate_TM is None:
            mixed = module.act_fn(up_TM)
        elif own_rule is _default_apply_gate:
            mixed = module.act_fn(gate_TM) * up_TM
        elif self._is_interleaved:
            mixed = module._apply_gate(torch.stack([gate_TM, up_TM], dim=-1).flatten(-2))
        else:
            mixed = module._apply_gate(torch.cat([gate_TM, up_TM], dim=-1))
        return mixed
