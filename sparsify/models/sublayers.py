"""The two sublayers of a decoder block, attention and MLP, and how one of them is left out.

No configuration of transformers says that a layer has no attention. A sublayer adds nothing to the
residual stream when the last of its linear layers is zero, which every loader understands: shapes,
size and speed stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import InputError
from sparsify.models.calls import BlockInputs, run_block
from sparsify.models.structure import linears_of, writers_of


def sublayers_of(block: nn.Module, name: str) -> dict[str, str]:
    """Names of the attention and the MLP of a block, relative to it.

    Where linear layers lie in the block itself (OPT's fc1 and fc2), the last of them stands for the
    MLP: it makes what the MLP adds.

    Args:
        block: a decoder block.
        name: of the model, for the message.

    Raises:
        InputError: the block's linear layers are not in an attention and one other module, or in
            an attention and the block itself.
    """
    found = [child for child, module in block.named_children() if linears_of(module)]
    attention = [child for child in found if "attn" in child or "attention" in child]
    others = [child for child in found if child not in attention]
    are_own = all(isinstance(block.get_submodule(child), nn.Linear) for child in others)
    if len(attention) != 1 or not others or (len(others) > 1 and not are_own):
        raise InputError(
            f"{name}: the linear layers of its blocks are in {', '.join(found)}, which are not an "
            "attention and an MLP, so sublayers cannot be dropped; use drop.candidates=[layers]"
        )
    return {"attention": attention[0], "mlp": others[-1]}


@contextmanager
def silent(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules that give zeros while this lasts."""

    def zeros(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(zeros).remove)
        yield


@torch.no_grad()
def require_residual(block: nn.Module, call: BlockInputs, name: str) -> None:
    """Require that a block whose attention and MLP give nothing hands on what it gets.

    Raises:
        InputError: it does not (norms with a bias behind a sublayer, a second stream).
    """
    parts = [block.get_submodule(part) for part in sublayers_of(block, name).values()]
    with silent(parts):
        output = run_block(block, call)
    if not torch.equal(output, call.hidden_BTD):
        raise InputError(
            f"{name}: a block whose attention and MLP give zeros still changes what it gets, so "
            "sublayers cannot be dropped; use drop.candidates=[layers]"
        )


@torch.no_grad()
def output_layers(block: nn.Module, part: str, call: BlockInputs, name: str) -> list[str]:
    """The linear layers of a sublayer that have to be zero for it to give zeros, tried on a call.

    That is the last one it calls; in a mixture of experts all that are as wide as the residual
    stream.

    Args:
        block: with its weights, which stay as they are.
        part: the sublayer's name in it.
        call: of the block.
        name: of the model, for the message.

    Returns:
        Names relative to the block.

    Raises:
        InputError: none of the two makes it zero (experts in one fused weight, for example).
    """
    module = block.get_submodule(part)
    linears = {
        f"{part}.{inner}" if inner else part: layer for inner, layer in linears_of(module).items()
    }
    called: list[str] = []
    with ExitStack() as stack:
        for inner, layer in linears.items():
            hook = layer.register_forward_hook(lambda *_, inner=inner: called.append(inner))
            stack.callback(hook.remove)
        run_block(block, call)
    width = call.hidden_BTD.shape[-1]
    for tried in (called[-1:], sorted(writers_of(linears, width))):
        if tried and _gives_zeros(block, module, [linears[inner] for inner in tried], call):
            return list(tried)
    raise InputError(
        f"{name}: no linear layers of {part} make it give zeros, so it cannot be dropped from a "
        "checkpoint; use drop.candidates=[layers]"
    )


def _gives_zeros(
    block: nn.Module, module: nn.Module, layers: Sequence[nn.Linear], call: BlockInputs
) -> bool:
    """Whether a sublayer gives zeros when these of its layers are zero."""
    held = [(p, p.data) for layer in layers for p in layer.parameters(recurse=False)]
    given: list[Tensor] = []
    hook = module.register_forward_hook(
        lambda _, __, out: given.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        for param, data in held:
            param.data = torch.zeros_like(data)
        run_block(block, call)
    finally:
        hook.remove()
        for param, data in held:
            param.data = data
    return len(given) == 1 and not given[0].any()
