"""Attention over rows of several documents that computes only pairs of tokens of one document.

transformers keeps documents apart with a mask over the row: T^2 numbers for a row of T tokens, all
of them computed, and no flash kernel on a GPU. Here rows are cut where documents begin. The model's
config names `varlen_attention`, so transformers' layers call it, and no mask is built for a name
that the masks do not know. Where documents begin is found once per call of the model, by a hook,
and travels in keyword arguments that transformers passes down for flash kernels (`cu_seq_lens_q`,
`max_length_q`); so recomputed layers get what belongs to their own rows. On GPUs in half precision
PyTorch's `varlen_attn` computes, elsewhere `scaled_dot_product_attention`, length by length.

A model that wants what is not here (capped scores, sinks, masks of its own) is refused, and every
model is compared with its masked self before it is trusted. Shape suffixes: N rows, T tokens of a
row, P = N T tokens laid end to end, H query heads, G key and value heads, D head width,
K = documents + 1, L tokens of a document.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.models.calls import evaluating, logits_of
from sparsify.models.structure import base_of, find_blocks

_FULL, _WINDOWED = "full_attention", "sliding_attention"


def attention_windows(config: Any, num_layers: int, name: str) -> tuple[int | None, ...]:
    """The attention window of every layer in tokens; None: the whole document.

    Args:
        config: of the text model.
        num_layers: of the model.
        name: of the model, for the message.

    Raises:
        InputError: a layer is neither full nor windowed attention.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * num_layers
    odd = sorted(set(kinds) - {_FULL, _WINDOWED})
    if odd:
        raise unknown_work(name, f"it has layers of kind {', '.join(odd)}")
    return tuple(window if kind == _WINDOWED else None for kind in kinds)


def unknown_work(name: str, why: str) -> InputError:
    """The error for a model whose operations would be a guess."""
    return InputError(f"{name}: its FLOPs cannot be counted, {why}; tokens/s is what can be had")


VARLEN = "documents"
"""name of this attention in a model's config; never written to a file"""

_RECORDED = "documents, recorded"

_HALF = (torch.float16, torch.bfloat16)

# What layers hand to attention beside queries, keys and values that changes nothing here.
_WITHOUT_EFFECT = {
    "position_ids", "cu_seq_lens_k", "max_length_k", "use_cache", "cache_position",
    "output_hidden_states", "output_router_logits", "num_items_in_batch",
}  # fmt: skip

# torch 2.11's varlen_attn takes fewer key heads without being told.
_IS_TOLD_OF_GQA = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters

_PROBE_LENGTHS = ((7, 1, 12), (12, 8))

# Share of the largest logit. Measured on the families of tests/families.py: 3e-16, 2e-7 and in half
# precision 0.005; with documents that see each other 0.3 to 1.1.
_RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-4}

_RELATIVE_HALF = 0.03

_KERNEL_LENGTHS = (70, 1, 29)

_KERNEL_WINDOW = 5

_KERNEL_RELATIVE = 0.03  # bfloat16 keeps 8 bits of scores, outputs and gradients


@dataclass(frozen=True)
class Documents:
    """Where the documents of some rows are when the rows are laid end to end."""

    cu_seqlens_K: Tensor
    """int32: first token of every document, and at last the number of tokens"""
    max_length: int
    """tokens of the longest document"""


def find_documents(positions_NT: Tensor) -> Documents:
    """The documents of rows by their positions (int64): one begins at every row's start and where a
    position does not follow the one before it. That is the rule of transformers' mask.
    """
    begins_NT = torch.ones_like(positions_NT, dtype=torch.bool)
    begins_NT[:, 1:] = positions_NT.diff(dim=1) != 1
    cu_seqlens_K = F.pad(begins_NT.flatten().nonzero()[:, 0], (0, 1), value=begins_NT.numel())
    return Documents(cu_seqlens_K.to(torch.int32), int(cu_seqlens_K.diff().max()))


def end_to_end(heads_NHTD: Tensor) -> Tensor:
    """Heads as transformers has them, as varlen kernels want them: (P, H, D)."""
    return heads_NHTD.transpose(1, 2).flatten(0, 1)


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    is_causal: bool | None = None, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention inside every document, as a function of transformers' attention interface.

    Args:
        module: the layer that calls.
        query: (N, H, T, D).
        key: (N, G, T, D); each is shared by H / G query heads.
        value: like `key`.
        attention_mask: has to be None: documents are what is kept apart.
        dropout: has to be 0.
        scaling: of the scores; None: D^-1/2.
        sliding_window: tokens that a token sees, itself included; None: its whole document so far.
        is_causal: None: as the module says.
        cu_seq_lens_q: int32 (documents + 1,), from `find_documents`.
        max_length_q: tokens of the longest document.
        others: of no effect, or refused.

    Returns:
        (N, T, H, D) and no weights.

    Raises:
        InputError: the layer asks for something that is not here.
    """
    _require_plain(module, query, key, attention_mask, dropout, is_causal, others)
    if cu_seq_lens_q is None or max_length_q is None:
        raise _refusal(module, "it does not hand on where documents begin (cu_seq_lens_q)")
    window = sliding_window or None  # some configs write 0 for none
    joined = (end_to_end(query), end_to_end(key), end_to_end(value))
    if has_kernel(query.device, query.dtype):
        output = _by_kernel(*joined, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        output = _by_document(*joined, cu_seq_lens_q, scaling, window)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register(VARLEN, varlen_attention)


def _require_plain(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, dropout: float,
    is_causal: bool | None, others: dict[str, Any],
) -> None:  # fmt: skip
    if attention_mask is not None:
        raise _refusal(module, "it makes a mask of its own")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _refusal(module, "it is not causal")
    if query.shape[2] != key.shape[2]:
        raise _refusal(module, "its keys come from a cache")
    if dropout:
        raise _refusal(module, f"it drops out {dropout} of the scores")
    for name, given in others.items():
        if name not in _WITHOUT_EFFECT and given is not None and given is not False:
            raise _refusal(module, f"it uses {name}")


def _refusal(module: nn.Module, why: str) -> InputError:
    return InputError(f"{type(module).__name__}: attention by document cannot replace it, {why}")


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `varlen_attn` computes, rather than one document after another."""
    return device.type == "cuda" and dtype in _HALF


def _by_kernel(
    query_PHD: Tensor, key_PGD: Tensor, value_PGD: Tensor, cu_seqlens_K: Tensor, max_length: int,
    scale: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """All documents in one launch; the kernel's window does not count the token itself."""
    before = -1 if window is None or window >= max_length else window - 1
    more: dict[str, Any] = {"scale": scale, "window_size": (before, 0)}
    if _IS_TOLD_OF_GQA:
        more["enable_gqa"] = query_PHD.shape[1] != key_PGD.shape[1]
    where = cu_seqlens_K, cu_seqlens_K, max_length, max_length
    return cast(Tensor, varlen.varlen_attn(query_PHD, key_PGD, value_PGD, *where, **more))


@torch.compiler.disable  # the lengths are this batch's: code compiled for them would serve no other
def _by_document(
    query_PHD: Tensor, key_PGD: Tensor, value_PGD: Tensor, cu_seqlens_K: Tensor,
    scale: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """Documents of one length together; (P, H, D)."""
    lengths = cu_seqlens_K.diff().tolist()
    parts = [heads.split(lengths) for heads in (query_PHD, key_PGD, value_PGD)]
    outputs: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        which = [number for number, other in enumerate(lengths) if other == length]
        query, key, value = (
            torch.stack([part[number] for number in which]).transpose(1, 2) for part in parts
        )
        seen_LL = None
        if window is not None and window < length:
            seen_LL = query.new_ones((length, length), dtype=torch.bool).tril().triu(1 - window)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen_LL, is_causal=seen_LL is None, scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        outputs.update(zip(which, output.transpose(1, 2), strict=True))
    return torch.cat([outputs[number] for number in range(len(lengths))])


def choose_attention(
    model: Any, wanted: str, is_joined: bool, in_half: bool, warn: Callable[[str], None]
) -> None:
    """Let a model attend by document if that is wanted, or if it helps and the model allows it.

    Call it before weights are split over workers or layers compiled.

    Args:
        model: a causal LM of transformers.
        wanted: varlen, masked, or auto: varlen where rows hold several documents, unless the model
            is refused. Rows of one document need no mask to begin with.
        is_joined: whether rows hold several documents.
        in_half: whether the model will compute in half precision, whatever it is held in now.
        warn: told why the model stays with its mask under auto.

    Raises:
        InputError: varlen is wanted and the model is refused.

    Cost: that of `check_varlen`.
    """
    if wanted == "masked" or (wanted == "auto" and not is_joined):
        return
    try:
        check_varlen(model, in_half)
    except InputError as error:
        if wanted == "varlen":
            raise InputError(f"distill.attention=varlen: {error}; use masked or auto") from None
        warn(f"{error}; a mask keeps its documents apart, which is slower")
    else:
        use_varlen(model)


def use_varlen(model: Any) -> None:
    """Let a model attend by document from now on; `check_varlen` says whether it may.

    Its `position_ids` decide; without them every row is one document. It takes no mask, no cache.
    """
    model.config.get_text_config()._attn_implementation = VARLEN
    base_of(model).register_forward_pre_hook(_hand_over_documents, with_kwargs=True)


def documents_of(base: nn.Module, rows: TokenRows) -> dict[str, Any]:
    """What to give a base model beside `rows` so that it need not look for their documents.

    Nothing for a model that does not attend by document. Without it the model copies positions from
    a GPU to the host, which waits for all that the GPU was given before.

    Args:
        base: of a model, where its forward takes rows.
        rows: with their positions in host memory (`TokenRows.to`), on the model's device.
    """
    config: Any = base.config
    if config.get_text_config()._attn_implementation != VARLEN:
        return {}
    positions_NT = rows.positions_NT if rows.host_NT is None else rows.host_NT
    return _handed_over(base, positions_NT, rows.ids_NT.device)


def _handed_over(base: nn.Module, positions_NT: Tensor, device: torch.device) -> dict[str, Any]:
    """Where the documents of some positions begin, as the arguments that layers hand on."""
    found = find_documents(positions_NT.cpu())
    wants_them = has_kernel(device, next(base.parameters()).dtype)
    cu_seqlens_K = found.cu_seqlens_K.to(device if wants_them else "cpu")
    return {
        "cu_seq_lens_q": cu_seqlens_K, "cu_seq_lens_k": cu_seqlens_K,
        "max_length_q": found.max_length, "max_length_k": found.max_length,
    }  # fmt: skip


def _hand_over_documents(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a model's forward: find the documents once for all of its layers, unless the caller
    has (`documents_of`)."""
    given = [key for key in ("attention_mask", "past_key_values") if kwargs.get(key) is not None]
    if len(args) > 1 or given:
        what = ", ".join(given) or "arguments without names"
        raise InputError(
            f"{type(base).__name__}: attends by document, and was given {what}; give position_ids"
        )
    if "cu_seq_lens_q" in kwargs:
        return args, kwargs
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    num_rows, length = tokens.shape[:2]
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(length)[None]
    found = _handed_over(base, positions.expand(num_rows, length), tokens.device)
    return args, {**kwargs, **found}


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
    name = type(model).__name__
    config = model.config.get_text_config()
    windows = _known_windows(config, len(find_blocks(model)[1]), name)
    embedding = model.get_input_embeddings()
    rows = _probe_rows(embedding.num_embeddings).to(embedding.weight.device)
    before = config._attn_implementation
    with evaluating(model):
        try:
            expected = logits_of(model, rows)
            found, calls = _recorded(model, config, rows)
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
            f"{name}: by document its logits are others than with its mask (off by {error:.3g}, "
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


@torch.no_grad()
def _recorded(model: Any, config: Any, rows: TokenRows) -> tuple[Tensor, list[_Call]]:
    """Logits by document, and what the layers asked for on the way."""
    calls: list[_Call] = []

    def recording(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        calls.append(_Call(*sizes, kwargs.get("scaling"), kwargs.get("sliding_window")))
        return varlen_attention(module, query, key, value, *args, **kwargs)

    handle = base_of(model).register_forward_pre_hook(_hand_over_documents, with_kwargs=True)
    ALL_ATTENTION_FUNCTIONS[_RECORDED] = recording
    config._attn_implementation = _RECORDED
    try:
        return logits_of(model, rows), calls
    except InputError:
        raise
    except Exception as error:  # a model that counts on its mask fails in a way of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{type(model).__name__}: fails without a mask ({reason})") from error
    finally:
        del ALL_ATTENTION_FUNCTIONS[_RECORDED]
        handle.remove()


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
        found = run(heads, _by_kernel, cu_seqlens_K.to(device), max(_KERNEL_LENGTHS))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: varlen_attn cannot compute its attention ({reason})") from None
    expected = run([tensor.float() for tensor in heads], _by_document, cu_seqlens_K)
    for got, right in zip(found, expected, strict=True):
        off = ((got - right).norm() / right.norm()).item()
        if not off <= _KERNEL_RELATIVE:
            raise InputError(f"{name}: varlen_attn is off by {off:.3g} of its output or gradient")
