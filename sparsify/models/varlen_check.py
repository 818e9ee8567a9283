"""Whether a model may attend by document: it must compute what it computes under its mask.

Shape suffixes: N rows, T tokens of a row, P tokens of all laid end to end, H query heads, D head
width, K = documents + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.models.calls import evaluating, logits_of
from sparsify.models.structure import base_of, find_blocks
from sparsify.models.varlen import (
    attention_windows,
    by_document,
    by_kernel,
    hand_over_documents,
    has_kernel,
    use_varlen,
    varlen_attention,
)

_RECORDED = "documents, recorded"

_PROBE_LENGTHS = ((7, 1, 12), (12, 8))

# Share of the largest logit. Measured on the families of tests/families.py: 3e-16, 2e-7 and in half
# precision 0.005; with documents that see each other 0.3 to 1.1.
_RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-4}

_RELATIVE_HALF = 0.03

_KERNEL_LENGTHS = (70, 1, 29)

_KERNEL_WINDOW = 5

_KERNEL_RELATIVE = 0.03  # bfloat16 keeps 8 bits of scores, outputs and gradients


def choose_attention(
    model: Any, wanted: str, is_joined: bool, in_half: bool, warn: Callable[[str], None],
    run: Callable[[TokenRows], Tensor] | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Let a model attend by document if that is wanted, or if it helps and the model allows it.

    Call it before weights are split over workers or layers compiled.

    Args:
        model: a causal LM of transformers.
        wanted: varlen, masked, or auto: varlen where rows hold several documents, unless the model
            is refused. Rows of one document need no mask to begin with.
        is_joined: whether rows hold several documents.
        in_half: whether the model will compute in half precision, whatever it is held in now.
        warn: told why the model stays with its mask under auto.
        run: None: `check_varlen` tries the whole model; else its first block, see `require_varlen`.

    Returns:
        Lets the model attend as before.

    Raises:
        InputError: varlen is wanted and the model is refused.

    Cost: that of `check_varlen`.
    """
    if wanted == "masked" or (wanted == "auto" and not is_joined):
        return lambda: None
    try:
        if run is None:
            check_varlen(model, in_half)
        else:
            require_varlen(model, run, 1, in_half)
    except InputError as error:
        if wanted == "varlen":
            raise InputError(f"attention=varlen: {error}; use masked or auto") from None
        warn(f"{error}; a mask keeps its documents apart, which is slower")
        return lambda: None
    return use_varlen(model)


@dataclass(frozen=True)
class _Call:
    """What one layer asked of attention."""

    num_heads: int
    num_key_heads: int
    head_size: int
    value_size: int
    scale: float | None
    window: int | None


def check_varlen(model: Any, in_half: bool = False) -> None:
    """Require that a model computes the same by document as with its mask.

    Every layer has to call attention, with the window that the config gives it (the rows tried are
    shorter than windows are). Logits of two short rows of several documents are compared with those
    under the mask. On a GPU, the kernel is compared with one document after another, gradients too.

    Args:
        model: a causal LM, left as it was; in `first_block_alone`, if all of its layers are alike.
        in_half: see `choose_attention`.

    Raises:
        InputError: the model is refused; says why.

    Cost: two forwards of 40 tokens; with a kernel, a few attentions of 100 tokens.
    """
    with evaluating(model):
        num_blocks = len(find_blocks(model)[1])
        require_varlen(model, lambda rows: logits_of(model, rows), num_blocks, in_half)


def require_varlen(
    model: Any, run: Callable[[TokenRows], Tensor], num_blocks: int, in_half: bool
) -> None:
    """The same of anything that makes tensors (N, T, ...) of rows, such as a model's first block.

    Args:
        model: whose attention it is; without dropout, left as it was.
        run: calls the model's forward, as far as it is wanted.
        num_blocks: that `run` computes; if fewer than the model has, these must all be alike.
        in_half: see `choose_attention`.

    Raises:
        InputError: see `check_varlen`.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    windows = _known_windows(config, num_blocks, name)
    embedding = model.get_input_embeddings()
    rows = _probe_rows(embedding.num_embeddings).to(embedding.weight.device)
    before = config._attn_implementation
    try:
        with torch.no_grad():
            expected = run(rows)
            found, calls = _recorded(model, config, rows, run)
    finally:
        config._attn_implementation = before
    asked = tuple(call.window or None for call in calls)
    if asked != tuple(window or None for window in windows):
        raise InputError(
            f"{name}: its layers ask for attention with windows {asked}, its config says {windows}"
        )
    error, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not error <= _RELATIVE.get(found.dtype, _RELATIVE_HALF) * largest:
        raise InputError(
            f"{name}: by document its outputs are others than with its mask (off by {error:.3g}, "
            f"largest {largest:.3g})"
        )
    if has_kernel(rows.ids_NT.device, torch.bfloat16 if in_half else found.dtype):
        for call in sorted(set(calls), key=str):
            _check_kernel(call, rows.ids_NT.device, name)


def _known_windows(config: Any, num_blocks: int, name: str) -> tuple[int | None, ...]:
    """What the config says of the blocks that are there: all, or the first for all of its kind."""
    try:
        windows = attention_windows(config, config.num_hidden_layers, name)
    except InputError:
        raise InputError(f"{name}: has layers of a kind that is not known here") from None
    if num_blocks < len(windows) and len(set(windows)) > 1:
        raise InputError(f"{name}: its layers differ, and weights are there for {num_blocks} alone")
    return windows[:num_blocks]


def _probe_rows(vocabulary: int) -> TokenRows:
    rows = [torch.cat([torch.arange(length) for length in row]) for row in _PROBE_LENGTHS]
    positions_NT = torch.stack(rows)
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(vocabulary, positions_NT.shape, generator=generator)
    return TokenRows(ids_NT, positions_NT)


def _recorded(
    model: Any, config: Any, rows: TokenRows, run: Callable[[TokenRows], Tensor]
) -> tuple[Tensor, list[_Call]]:
    """What `run` makes by document, and what the layers asked for on the way."""
    calls: list[_Call] = []

    def recording(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        calls.append(_Call(*sizes, kwargs.get("scaling"), kwargs.get("sliding_window")))
        return varlen_attention(module, query, key, value, *args, **kwargs)

    handle = base_of(model).register_forward_pre_hook(hand_over_documents, with_kwargs=True)
    ALL_ATTENTION_FUNCTIONS[_RECORDED] = recording
    config._attn_implementation = _RECORDED
    try:
        return run(rows), calls
    except InputError:
        raise
    except Exception as error:  # a model that counts on its mask fails in a way of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{type(model).__name__}: fails without a mask ({reason})") from error
    finally:
        del ALL_ATTENTION_FUNCTIONS[_RECORDED]
        handle.remove()


@torch.enable_grad()
def _check_kernel(call: _Call, device: torch.device, name: str) -> None:
    """Compare the kernel with one document after another, outputs and gradients."""
    window = None if call.window is None else _KERNEL_WINDOW
    cu_seqlens_K = torch.tensor((0, *_KERNEL_LENGTHS)).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        numbers = torch.randn(sum(_KERNEL_LENGTHS), *shape, generator=generator)
        return numbers.to(device, torch.bfloat16)

    heads = [
        random(call.num_heads, call.head_size), random(call.num_key_heads, call.head_size),
        random(call.num_key_heads, call.value_size),
    ]  # fmt: skip
    weights_PHD = random(call.num_heads, call.value_size)

    def run(inputs: list[Tensor], attend: Callable[..., Tensor], *where: Any) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        output = attend(*inputs, *where, call.scale, window)
        return [output, *torch.autograd.grad((output * weights_PHD).sum(), inputs)]

    try:
        found = run(heads, by_kernel, cu_seqlens_K.to(device), max(_KERNEL_LENGTHS))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: varlen_attn cannot compute its attention ({reason})") from None
    expected = run([tensor.float() for tensor in heads], by_document, cu_seqlens_K)
    for got, right in zip(found, expected, strict=True):
        off = ((got - right).norm() / right.norm()).item()
        if not off <= _KERNEL_RELATIVE:
            raise InputError(f"{name}: varlen_attn is off by {off:.3g} of its output or gradient")
