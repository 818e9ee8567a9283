"""The language-model head: found, checked against the model's logits, applied to hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import InputError
from sparsify.models.calls import evaluating
from sparsify.models.structure import base_of


@dataclass(frozen=True)
class HeadTransform:
    """What a model family does to the head's output u: z = cap tanh(scale u / cap), or scale u."""

    scale: float = 1.0
    soft_cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Transform in place."""
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: transform(h W^T + b)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    transform: HeadTransform = field(default_factory=HeadTransform)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of all of `hidden` (..., D) at once, in float32 at least; for few tokens."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(dtype) @ self.weight_VD.to(dtype).T
        if self.bias_V is not None:
            logits += self.bias_V
        return self.transform.apply_(logits)


_ALIKE = 0.01  # of a row's length: never trained together, and rounded

_ALIKE_TOKENS, _ALIKE_ROWS = 1024, 8192  # so many beside so many of the vocabulary at a time

_CHECK_TOKENS = 8

_CHECK_SIZE = 100.0  # of the logits compared: soft caps in use are 30 to 50

# Measured on the families of tests/families.py: 2e-7; bfloat16 rounds logits by up to 2^-8.
_CHECK_RELATIVE = {torch.float64: 1e-6, torch.float32: 1e-4}

_CHECK_RELATIVE_HALF = 0.03


@dataclass(frozen=True)
class LanguageHead:
    """A causal language model in two parts: logits = transform(linear(base(...).last_hidden))."""

    base: nn.Module
    """returns `last_hidden_state`, and `hidden_states` when asked"""
    linear: nn.Linear
    transform: HeadTransform

    def plain(self) -> Head:
        """The head as plain tensors that follow the weights (a teacher's, for example)."""
        bias = self.linear.bias
        return Head(
            self.linear.weight.detach(), None if bias is None else bias.detach(), self.transform
        )


def find_head(model: Any) -> LanguageHead:
    """The two parts of a causal language model; `check_head` proves that they are right.

    Raises:
        InputError: there is no linear head, or no base model in front of it.
    """
    name = type(model).__name__
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise InputError(
            f"{name}: its head is {type(linear).__name__}, expected nn.Linear; recovery needs a "
            "causal language model with a linear head"
        )
    base = base_of(model)
    if base is model:
        raise InputError(
            f"{name}: it has no base model that ends before the head; recovery needs a causal "
            "language model of transformers such as LlamaForCausalLM"
        )
    return LanguageHead(base, linear, _transform_of(model.config.get_text_config()))


def _transform_of(config: Any) -> HeadTransform:
    """What the configuration says is done to logits, by the names that families give it."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon H1
        value = getattr(config, name, None)
        scale *= value if isinstance(value, int | float) else 1.0
    divisor = getattr(config, "logits_scaling", None)  # Granite
    # Gemma 2 and later; RecurrentGemma; xLSTM
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    soft_cap = next((cap for name in names if (cap := getattr(config, name, None))), None)
    return HeadTransform(scale / (divisor or 1.0), soft_cap)


@torch.no_grad()
def check_head(model: Any) -> LanguageHead:
    """`find_head`, compared with the model's own logits on one short row.

    The input of the head is scaled so that the largest logit is about 100, where a soft cap shows
    even in a model whose own logits are small. Call it before weights are split over workers.

    Raises:
        InputError: the logits differ; names the model.

    Cost: three forward passes of eight tokens.
    """
    found = find_head(model)
    name = type(model).__name__
    device = found.linear.weight.device
    num_words = model.config.get_text_config().vocab_size
    ids = torch.arange(_CHECK_TOKENS, device=device)[None] % num_words
    with evaluating(model):
        hidden = found.base(input_ids=ids, use_cache=False).last_hidden_state
        if hidden.shape[-1] != found.linear.in_features:
            raise InputError(
                f"{name}: its base model returns states of width {hidden.shape[-1]}, its head "
                f"takes {found.linear.in_features}; recovery cannot train it"
            )
        size = found.linear(hidden).abs().max().item() * found.transform.scale
        stretch = _CHECK_SIZE / size if size else 1.0
        stretched = hidden * stretch
        handle = found.linear.register_forward_pre_hook(lambda _, args: (args[0] * stretch,))
        try:
            expected = model(input_ids=ids, use_cache=False).logits.float()
        finally:
            handle.remove()
    error = (found.plain().logits(stretched).float() - expected).abs().max().item()
    limit = _CHECK_RELATIVE.get(hidden.dtype, _CHECK_RELATIVE_HALF)
    if not error <= limit * expected.abs().max().item():
        raise InputError(
            f"{name}: its logits are not what its head and its configuration say (off by "
            f"{error:.3g}, largest {expected.abs().max().item():.3g}); it does something to them "
            "that is not known here: recovery cannot train it, use stages without distill"
        )
    return found


@torch.no_grad()
def alike_tokens(weight_VD: Tensor, ids: Tensor) -> Tensor:
    """Those of `ids` whose row of a head is another token's, to 1 % of its length.

    Rows that were never trained are so, and hidden states can hardly make one such token likelier
    than the other: where the head is frozen, a model does not learn to write them.

    Args:
        weight_VD: of the head.
        ids: int64 (N,), different tokens.

    Returns:
        int64, at most N.

    Cost: N V D multiplications; float32 copies of 1,024 and of 8,192 rows, and a matrix of these.
    """
    found = []
    for own_N in ids.split(_ALIKE_TOKENS):
        own_ND = weight_VD[own_N].float()
        nearest_N = torch.full((len(own_N),), torch.inf, device=weight_VD.device)
        for start in range(0, len(weight_VD), _ALIKE_ROWS):
            part = weight_VD[start : start + _ALIKE_ROWS].float()
            squares = torch.addmm(part.square().sum(1), own_ND, part.T, alpha=-2)
            inside = (own_N >= start) & (own_N < start + len(part))
            squares[inside, own_N[inside] - start] = torch.inf  # a token and itself
            other_N = squares.argmin(1)
            # Squares cancel to about 1e-6: the distance is taken itself.
            distance_N = (own_ND - part[other_N]).norm(dim=1)
            distance_N.masked_fill_(inside & (other_N == own_N - start), torch.inf)
            nearest_N = torch.minimum(nearest_N, distance_N)
        found.append(own_N[nearest_N <= _ALIKE * own_ND.norm(dim=1)])
    return torch.cat(found)
