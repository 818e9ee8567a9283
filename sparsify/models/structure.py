"""What a decoder is made of: its blocks, their layers, and what pruning cannot reach in them.

transformers holds the experts of many families as one parameter of three dimensions (experts,
rows, columns) instead of a list of nn.Linear. Those that `unfuse.unfuse_experts` does not take
apart stay dense: such weights see their tokens inside one fused operation, where no layer input can
be watched.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from sparsify.errors import InputError

_ROUTER = re.compile(r"Router|Gating|MoE\w*Gate$")
"""in the names of classes, such as Llama4Router, JetMoeTopKGating and HunYuanMoEV1Gate"""


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the expert weights in the decoder blocks that are no nn.Linear and stay dense.

    Args:
        model: a transformers decoder; its weights may be on the meta device.

    Returns:
        Full dotted names of the floating point parameters of three dimensions inside the blocks,
        and of matrices of modules that are called experts, in the model's order. Kernels of
        convolutions also have three dimensions; they are left out.

    Raises:
        InputError: the model has no decoder blocks.
    """
    list_name, blocks = find_blocks(model)
    return [
        f"{list_name}.{module_name}.{name}" if module_name else f"{list_name}.{name}"
        for module_name, module in blocks.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point()
        and (parameter.ndim == 3 or _is_flat_expert(module_name, module, parameter))
    ]


def _is_flat_expert(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    """Experts one below the other in a matrix, as DBRX has them."""
    return parameter.ndim == 2 and "experts" in name and not isinstance(module, nn.Linear)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's decoder blocks and the dotted name of their list.

    They are the list of modules that contain nn.Linear, in the text decoder where the model says
    which of its parts that is. Lists inside such a list (experts, adapters) do not count. Of
    several, it is the one as long as the configuration's num_hidden_layers; the longest, and the
    first of equally long ones, in a module without a configuration.

    Raises:
        InputError: the model has no such list, or several of which none is the one; or its modules
            are of several classes. Names them.
    """
    name = type(model).__name__
    lists = _block_lists(model)
    config = getattr(model, "config", None)
    if len(lists) > 1 and config is not None:
        wanted = getattr(config.get_text_config(), "num_hidden_layers", None)
        found = {key: blocks for key, blocks in lists.items() if len(blocks) == wanted}
        if len(found) != 1:
            said = ", ".join(f"{key} ({len(blocks)})" for key, blocks in lists.items())
            raise InputError(
                f"{name}: it has several lists of modules with nn.Linear layers, {said}, and which "
                f"are its {wanted or ''} decoder blocks is not known; only models built as one "
                "list of decoder blocks can be pruned"
            )
        lists = found
    if not lists:
        kinds = {type(module).__name__ for module in model.modules()}
        why = (
            "its layers are transformers' Conv1D, whose weights are stored transposed"
            if "Conv1D" in kinds
            else "no list of equal blocks with nn.Linear layers was found"
        )
        raise InputError(
            f"{name}: {why}; only models built as a list of decoder blocks of nn.Linear layers can "
            "be pruned"
        )
    best = max(lists, key=lambda key: len(lists[key]))
    classes = sorted({type(module).__name__ for module in lists[best]})
    if len(classes) > 1:
        raise InputError(
            f"{name}: its blocks {best} are of {len(classes)} classes ({', '.join(classes)}); only "
            "models whose decoder blocks are of one class can be pruned"
        )
    if not all(linears_of(module) for module in lists[best]):
        raise InputError(
            f"{name}: not all of its blocks {best} have nn.Linear layers; only models whose "
            "decoder blocks all have can be pruned"
        )
    return best, lists[best]


def base_of(model: Any) -> nn.Module:
    """The part of a causal language model that ends before its head; the model if it has none.

    That is transformers' `base_model`, but for families that keep their only inner model under
    another name than they say (Llama 4).
    """
    base: nn.Module = model.base_model
    inner = [part for part in model.children() if hasattr(part, "base_model_prefix")]
    return inner[0] if base is model and len(inner) == 1 else base


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Name -> list of modules of which one has nn.Linear, none inside another; those of the text
    decoder where it has one."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not is_inside and any(map(linears_of, module)):
            found[name] = module
    get_decoder: Any = getattr(model, "get_decoder", None)
    part = model if get_decoder is None else get_decoder()
    inside = {id(module) for module in part.modules()} if isinstance(part, nn.Module) else set()
    return {key: blocks for key, blocks in found.items() if id(blocks) in inside} or found


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear inside `block` by its dotted name relative to the block, but for routers.

    They choose experts: the few weights of most families' are no nn.Linear, and stay dense. Those
    that are one, or have one, do too.
    """
    routers = set(routers_of(block))
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name not in routers
    }


def routers_of(block: nn.Module) -> list[str]:
    """Names, relative to the block, of what chooses experts, and of its children."""
    modules = dict(block.named_modules())
    return [
        name
        for name, module in modules.items()
        if _ROUTER.search(type(module).__name__)
        or _ROUTER.search(type(modules[name.rpartition(".")[0]]).__name__)
    ]


def writers_of(linears: dict[str, nn.Linear], hidden_size: int) -> dict[str, nn.Linear]:
    """Those whose output is as wide as the residual stream, so that it may be added to it."""
    return {name: layer for name, layer in linears.items() if layer.out_features == hidden_size}
