"""The head of a Hugging Face causal language model, and a student that computes its own loss.

Works from `get_output_embeddings()`, `base_model` and the names that configurations use for what is
done to logits, and proves on a row of tokens that this is what the model does. Shape suffixes: B
rows, T tokens of a row, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.distill import head_distillation_loss
from sparsify.errors import InputError
from sparsify.head import CHUNK_TOKENS, Head, Teacher
from sparsify.head_terms import HeadTransform, Sample
from sparsify.loss_terms import LossWeights, TokenCounts
from sparsify.text import TokenRows

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
    if model.base_model is model:
        raise InputError(
            f"{name}: it has no base model that ends before the head; recovery needs a causal "
            "language model of transformers such as LlamaForCausalLM"
        )
    return LanguageHead(model.base_model, linear, _transform_of(model.config.get_text_config()))


def _transform_of(config: Any) -> HeadTransform:
    """What the configuration says is done to logits, by the names that families give it."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon H1
        value = getattr(config, name, None)
        scale *= value if isinstance(value, int | float) else 1.0
    divisor = getattr(config, "logits_scaling", None)  # Granite
    soft_cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later
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
    was_training = model.training
    model.eval()
    try:
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
    finally:
        model.train(was_training)
    error = (found.plain().logits(stretched).float() - expected).abs().max().item()
    limit = _CHECK_RELATIVE.get(hidden.dtype, _CHECK_RELATIVE_HALF)
    if not error <= limit * expected.abs().max().item():
        raise InputError(
            f"{name}: its logits are not what its head and its configuration say (off by "
            f"{error:.3g}, largest {expected.abs().max().item():.3g}); it does something to them "
            "that is not known here: recovery cannot train it, use stages without distill"
        )
    return found


class LossHead(nn.Module):
    """A model's head that answers with the loss instead of logits.

    Owns no weights: its parameters are those of the model's own head. ZeRO-3 collects a module's
    parameters around its forward, so the loss has to be computed inside the forward of a module
    that has them; gradients are made there too, and the backward pass does not read the weights.
    """

    def __init__(self, found: LanguageHead) -> None:
        super().__init__()
        self.weight = found.linear.weight
        self.bias = found.linear.bias
        self.transform = found.transform
        self.metrics: dict[str, Tensor] = {}
        """of the last call; not returned, because ZeRO-3 waits for a gradient of every output"""

    def forward(self, hidden_BTD: Tensor, **arguments: Any) -> Tensor:
        """The loss of `distill.head_distillation_loss`."""
        head = Head(self.weight, self.bias, self.transform)
        loss, self.metrics = head_distillation_loss(hidden_BTD, head, **arguments)
        return loss


class DistillStudent(nn.Module):
    """A causal language model whose forward returns the distillation loss of some rows.

    To everything that asks for names it is the model itself: parameters, buffers and state carry
    the model's own names. `model` is the model, for saving.

    Args:
        model: the student.
        chunk_tokens: tokens whose logits exist at one time.
        found: what `check_head` said of it earlier; None: it is asked now, which takes all weights.

    Raises:
        InputError: the model's head is not what it seems (`check_head`).
    """

    def __init__(
        self, model: Any, chunk_tokens: int = CHUNK_TOKENS, found: LanguageHead | None = None
    ) -> None:
        super().__init__()
        found = found or check_head(model)
        self.model = model
        self.loss_head = LossHead(found)
        self._base = (found.base,)  # in a tuple: it is inside `model`, not a second child
        self._chunk_tokens = chunk_tokens

    def forward(
        self, rows: TokenRows, weights: LossWeights, counts: TokenCounts | None = None,
        teacher: Teacher | Sample | None = None,
        teacher_states: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Loss and metrics of B rows (see `distill.head_distillation_loss`).

        Args:
            rows: the tokens.
            weights: the terms.
            counts: what sums over tokens are divided by; None: the counts of `rows`.
            teacher: its final hidden states (B, T, Dt) and its head, or a sample; None if no KL
                term has a weight.
            teacher_states: its hidden states after every block, for SquareHead.
        """
        output = self._base[0](
            input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False,
            output_hidden_states=weights.square_head > 0,
        )  # fmt: skip
        loss = self.loss_head(
            output.last_hidden_state, rows=rows, weights=weights, counts=counts, teacher=teacher,
            states=output.hidden_states if weights.square_head else None,
            teacher_states=teacher_states, chunk_tokens=self._chunk_tokens,
        )  # fmt: skip
        return loss, self.loss_head.metrics

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the model, under the model's names."""
        return self.model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Those of the model, under the model's names."""
        return self.model.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the model."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model."""
        return self.model.load_state_dict(*args, **kwargs)
