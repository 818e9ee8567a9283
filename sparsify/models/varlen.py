"""Attention over rows of several documents that computes only pairs of tokens of one document.

transformers keeps documents apart with a mask over the row: T^2 numbers for a row of T tokens, all
of them computed, and no flash kernel on a GPU. Here rows are cut where documents begin. The model's
config names `varlen_attention`, so transformers' layers call it, and no mask is built for a name
that the masks do not know. Where documents begin is found once per call of the model, by a hook,
and travels in keyword arguments that transformers passes down for flash kernels (`cu_seq_lens_q`,
`max_length_q`); so recomputed layers get what belongs to their own rows. On GPUs in half precision
PyTorch's `varlen_attn` computes, elsewhere `scaled_dot_product_attention`, length by length.

A model that wants what is not here (capped scores, sinks, masks of its own) is refused, and every
model is compared with its masked self before it is trusted (`varlen_check`). Shape suffixes: N
rows, T tokens of a row, P = N T tokens laid end to end, H query heads, G key and value heads, D
head width, K = documents + 1, L tokens of a document.
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
from transformers.modeling_utils import AttentionInterface

from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.models.structure import base_of

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

HALF = (torch.float16, torch.bfloat16)
"""types that PyTorch has a kernel for"""

# What layers hand to attention beside queries, keys and values that changes nothing here.
_WITHOUT_EFFECT = {
    "position_ids", "cu_seq_lens_k", "max_length_k", "use_cache", "cache_position",
    "output_hidden_states", "output_router_logits", "num_items_in_batch",
}  # fmt: skip

# torch 2.11's varlen_attn takes fewer key heads without being told.
_IS_TOLD_OF_GQA = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


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
        output = by_kernel(*joined, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        output = by_document(*joined, cu_seq_lens_q, scaling, window)
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
    return device.type == "cuda" and dtype in HALF


def by_kernel(
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
def by_document(
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


def use_varlen(model: Any) -> Callable[[], None]:
    """Let a model attend by document from now on; `check_varlen` says whether it may.

    Its `position_ids` decide; without them every row is one document. It takes no mask, no cache.

    Returns:
        Lets it attend as before.
    """
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, VARLEN
    hook = base_of(model).register_forward_pre_hook(hand_over_documents, with_kwargs=True)

    def leave() -> None:
        config._attn_implementation = before
        hook.remove()

    return leave


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


def hand_over_documents(
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
