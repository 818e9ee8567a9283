"""Experts of a mixture as linear layers, under the names that the family's checkpoints have.

transformers holds the experts of many families as two parameters of three dimensions (experts,
rows, columns) in one fused module, while their checkpoints hold one matrix for each expert and
projection: it merges them as it loads and splits them as it saves. Here such a module is replaced
by one that is built as the checkpoints are, so that an expert's layers are watched, solved, masked,
trained, packed, read and written like any other linear layer.

Which piece of a fused parameter goes under which name is asked of transformers itself, by having it
save small marked tensors; families that store experts fused keep the fused module, and so do
families whose experts have biases, are transposed, or compute in a way of their own.
Shape suffixes: E experts, M inner size of an expert, D hidden size, T tokens, K experts of a token,
S = T K pairs of a token and one of its experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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

_PLAIN = {"has_bias": False, "is_transposed": False, "is_concatenated": True}
"""what transformers' decorator of fused experts says of those that can be taken apart"""


class Expert(nn.Module):
    """One expert; its linears are children under the names that the checkpoint has for them.

    Args:
        linears: gate (not in all families), up and down -> name and linear.
        mix: what comes between: (gate's output or None, up's output) -> down's input.
    """

    tokens_T: Tensor
    """ids, in rising order, of the tokens of the last forward, counted over the whole batch"""

    def __init__(
        self, linears: Mapping[str, tuple[str, nn.Linear]],
        mix: Callable[[Tensor | None, Tensor], Tensor],
    ) -> None:  # fmt: skip
        super().__init__()
        self._names = {role: name for role, (name, _) in linears.items()}
        self._mix = mix
        for name, linear in linears.values():
            self.add_module(name, linear)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """The expert's output for its tokens, (T, D)."""
        of = {role: self.get_submodule(name) for role, name in self._names.items()}
        gate_TM = of["gate"](hidden_TD) if "gate" in of else None
        output_TD: Tensor = of["down"](self._mix(gate_TM, of["up"](hidden_TD)))
        return output_TD

    def reads_input(self, name: str) -> bool:
        """Whether a child reads what the router sends here, and not what another child makes."""
        return name != self._names["down"]


class RoutedExperts(nn.Module):
    """All experts of one layer, children "0", "1", ...; computes what the fused module does.

    Every expert is called in every forward, also on no tokens: processes that share the weights
    then gather them in the same order, and each weight has a gradient.
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def forward(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Send every token to its experts and add up what these make of it.

        Args:
            hidden_TD: all tokens of the batch.
            index_TK: int, the experts of each.
            weights_TK: how much each of them counts.

        Returns:
            (T, D) in the dtype of `hidden_TD`, in which a token's experts are added up in the
            order of `index_TK`: the same numbers in every run.

        Cost: that of the experts on T K tokens, and one wait for the device; launches grow with E.
        """
        experts: list[Any] = list(self.children())
        order_S = index_TK.flatten().argsort(stable=True)
        tokens_S = order_S // index_TK.shape[1]
        counts = torch.bincount(index_TK.flatten(), minlength=len(experts)).tolist()
        outputs = []
        for expert, tokens_T in zip(experts, tokens_S.split(counts), strict=True):
            expert.tokens_T = tokens_T
            outputs.append(expert(hidden_TD[tokens_T]))
        place_S = torch.empty_like(order_S)
        place_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        outputs_TKD = torch.cat(outputs)[place_S].view(*index_TK.shape, -1)
        return (outputs_TKD * weights_TK[..., None]).sum(1).to(hidden_TD.dtype)


@dataclass(frozen=True)
class ExpertLayer:
    """What is known of a linear layer of an expert."""

    expert: Expert
    kind: str
    """its name in the block with * for the expert's number; the same for all experts"""
    reads_input: bool
    """see `Expert.reads_input`"""


def expert_layers(block: nn.Module) -> dict[str, ExpertLayer]:
    """The linear layers of a block's experts, by their names relative to the block."""
    return {
        f"{path}.{number}.{name}": ExpertLayer(expert, f"{path}.*.{name}", expert.reads_input(name))
        for path, module in block.named_modules()
        if isinstance(module, RoutedExperts)
        for number, expert in module.named_children()
        if isinstance(expert, Expert)
        for name, _ in expert.named_children()
    }


def unfuse_experts(model: nn.Module) -> None:
    """Replace fused experts by linear layers in place, wherever checkpoints have them one by one.

    Modules on the way to them get the names that the checkpoints have too (`block_sparse_moe` for
    Mixtral's `mlp`), under which the model's state is then stored; their old names still find them.

    Args:
        model: of transformers; its weights may be on the meta device. Another is left as it is.

    Cost: a copy of the experts' weights, one layer of the model at a time.
    """
    found = {path: module for path, module in model.named_modules() if _can_be_taken_apart(module)}
    names = _stored_names(model, found) if found else {}
    for path, of_experts in names.items():
        model.set_submodule(path, _split(found[path], of_experts))
    if names:
        _take_stored_names(model)


def _can_be_taken_apart(module: nn.Module) -> bool:
    if any(getattr(module, flag, None) is not value for flag, value in _PLAIN.items()):
        return False
    if getattr(module, "has_post_expert_norm", False):  # transformers 5.19 does not say it
        return False
    held = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return held == _rows(module).keys() and all(module.get_parameter(n).ndim == 3 for n in held)


def _stored_names(model: nn.Module, found: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Path of fused experts -> for each expert its roles and the names of their linears; only of
    those that the family's checkpoints hold as one matrix each."""
    marks: dict[str, Tensor] = {}  # of real memory, wherever the model is being made
    meaning: list[tuple[str, int, str]] = []
    for path, module in found.items():
        for name, roles in _rows(module).items():
            numbers, first = range(len(module.down_proj)), len(meaning)
            meaning += [(path, index, role) for index in numbers for role in roles]
            codes_F = torch.arange(first, len(meaning), device="cpu")
            marks[f"{path}.{name}"] = codes_F.view(-1, len(roles), 1)
    names: dict[str, list[dict[str, str]]] = {
        path: [{} for _ in module.down_proj] for path, module in found.items()
    }
    for name, mark in _as_stored(model, marks).items():
        match = re.fullmatch(r".*\.(\d+)\.(\w+)\.weight", name)
        if match is None or mark.numel() > 1:
            continue
        path, index, role = meaning[int(mark)]
        if int(match[1]) == index:
            names[path][index][role] = match[2]
    wanted = {path: {r for of in _rows(m).values() for r in of} for path, m in found.items()}
    return {p: found for p, found in names.items() if all(wanted[p] == f.keys() for f in found)}


def _rows(module: Any) -> dict[str, tuple[str, ...]]:
    """Fused parameter -> what its rows are, in this order."""
    if module.has_gate:
        return {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
    return {"up_proj": ("up",), "down_proj": ("down",)}


def _as_stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model as transformers saves a model of this family that was made anew."""
    key = "_weight_conversions"  # how its own files were named; what counts are the family's
    held = model.__dict__.pop(key, None)
    try:
        return dict(revert_weight_conversion(model, dict(tensors)))  # type: ignore[arg-type]
    finally:
        if held is not None:
            model.__dict__[key] = held


def _take_stored_names(model: nn.Module) -> None:
    """Give the modules around experts the names that they have in the family's checkpoints, where
    these differ in single words inside a block; nothing where it is not as simple."""
    # In the order in which transformers undoes them as it saves.
    conversions = get_model_conversion_mapping(model, add_legacy=False)[::-1]  # type: ignore[arg-type]
    plain = [c for c in conversions if isinstance(c, WeightRenaming)]
    undo: Any = [c.reverse_transform() for c in plain if not isinstance(c, PrefixChange)]
    renames: dict[str, str] = {}
    for key in model.state_dict():
        stored_key = key
        for renaming in undo:
            stored_key, _ = renaming.rename_source_key(stored_key)
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


def _split(module: Any, names: list[dict[str, str]]) -> RoutedExperts:
    """The linears of fused experts; the fused weights are let go."""
    fused = {name: module._parameters.pop(name) for name in _rows(module)}
    experts = []
    for index, of_roles in enumerate(names):
        linears = {}
        for name, roles in _rows(module).items():
            for role, weight_OI in zip(roles, fused[name][index].chunk(len(roles)), strict=True):
                linears[role] = of_roles[role], _linear(weight_OI)
        experts.append(Expert(linears, _Mixer(module)))
    return RoutedExperts(experts)


def _linear(weight_OI: Tensor) -> nn.Linear:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    copy_OI = weight_OI.detach().clone(memory_format=torch.contiguous_format)
    linear.weight = nn.Parameter(copy_OI, requires_grad=weight_OI.requires_grad)
    return linear


class _Mixer:
    """The fused module's own rule between its projections."""

    def __init__(self, module: Any) -> None:
        self._module = module  # without weights

    def __call__(self, gate_TM: Tensor | None, up_TM: Tensor) -> Tensor:
        module = self._module
        if gate_TM is None:
            mixed: Tensor = module.act_fn(up_TM)
        elif type(module)._apply_gate is _default_apply_gate:
            mixed = module.act_fn(gate_TM) * up_TM
        else:
            mixed = module._apply_gate(torch.cat([gate_TM, up_TM], dim=-1))
        return mixed
