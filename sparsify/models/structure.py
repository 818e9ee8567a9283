"""What a decoder is made of: its blocks, their layers, and what pruning cannot reach in them.

transformers holds the experts of many families as one parameter of three dimensions (experts,
rows, columns) instead of a list of nn.Linear. Such weights see their tokens through a router inside
one fused operation, so that no layer input can be watched: they stay dense.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsify.errors import InputError


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

    They are the longest list of modules of one class that contain nn.Linear; lists inside such a
    list (experts, for example) do not count, and the first of equally long lists wins.

    Raises:
        InputError: the model has no such list.
    """
    best: tuple[str, nn.ModuleList] | None = None
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not _is_block_list(module):
            continue
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        inside.append(name)
        if best is None or len(module) > len(best[1]):
            best = (name, module)
    if best is None:
        kinds = {type(module).__name__ for module in model.modules()}
        why = (
            "its layers are transformers' Conv1D, whose weights are stored transposed"
            if "Conv1D" in kinds
            else "no list of equal blocks with nn.Linear layers was found"
        )
        raise InputError(
            f"{type(model).__name__}: {why}; only models built as a list of equal decoder blocks "
            "of nn.Linear layers can be pruned"
        )
    return best


def base_of(model: Any) -> nn.Module:
    """The part of a causal language model that ends before its head; the model if it has none.

    That is transformers' `base_model`, but for families that keep their only inner model under
    another name than they say (Llama 4).
    """
    base: nn.Module = model.base_model
    inner = [part for part in model.children() if hasattr(part, "base_model_prefix")]
    return inner[0] if base is model and len(inner) == 1 else base


def _is_block_list(modules: nn.ModuleList) -> bool:
    classes = {type(module) for module in modules}
    return len(classes) == 1 and all(linears_of(module) for module in modules)


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear inside `block` by its dotted name relative to the block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def writers_of(linears: dict[str, nn.Linear], hidden_size: int) -> dict[str, nn.Linear]:
    """Those whose output is as wide as the residual stream, so that it may be added to it."""
    return {name: layer for name, layer in linears.items() if layer.out_features == hidden_size}
