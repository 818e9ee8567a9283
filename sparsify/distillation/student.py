"""A student that computes its own loss, inside its forward, from its final hidden states.

Shape suffixes: B rows, T tokens of a row, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from sparsify.data.rows import CHUNK_TOKENS, TokenRows
from sparsify.data.teacher_samples import Sample
from sparsify.distillation.head_loss import Teacher
from sparsify.distillation.head_terms import TokenCounts
from sparsify.distillation.loss import head_distillation_loss
from sparsify.models.calls import run_model
from sparsify.models.lm_head import Head, LanguageHead, check_head
from sparsify.models.varlen import documents_of
from sparsify.params import LossWeights


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
        """The loss of `loss.head_distillation_loss`."""
        head = Head(self.weight, self.bias, self.transform)
        loss, self.metrics = head_distillation_loss(hidden_BTD, head, **arguments)
        return loss


def states_of_layers(states: tuple[Tensor, ...], kept_layers: Sequence[int]) -> tuple[Tensor, ...]:
    """Of a teacher's hidden states those that stand for a student's that lost layers.

    Args:
        states: as transformers gives them: the embedding's, then one per layer, the last of them
            behind the final norm.
        kept_layers: layers of the teacher that the student has, in order.

    Returns:
        The embedding's, those after each kept layer but the last, and the teacher's last.
    """
    return (states[0], *(states[1 + layer] for layer in kept_layers[:-1]), states[-1])


class DistillStudent(nn.Module):
    """A causal language model whose forward returns the distillation loss of some rows.

    To everything that asks for names it is the model itself: parameters, buffers and state carry
    the model's own names. `model` is the model, for saving.

    Args:
        model: the student.
        chunk_tokens: tokens whose logits exist at one time.
        found: what `check_head` said of it earlier; None: it is asked now, which takes all weights.
        kept_layers: of a student that lost layers, those of the teacher that it still has: each of
            its blocks is compared with that one, and the last, whose states are behind the final
            norm, with the teacher's last. None: with the blocks of the same number.

    Raises:
        InputError: the model's head is not what it seems (`check_head`).
    """

    def __init__(
        self, model: Any, chunk_tokens: int = CHUNK_TOKENS, found: LanguageHead | None = None,
        kept_layers: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        found = found or check_head(model)
        self.model = model
        self.loss_head = LossHead(found)
        self._base = (found.base,)  # in a tuple: it is inside `model`, not a second child
        self._chunk_tokens = chunk_tokens
        self._kept_layers = kept_layers

    def forward(
        self, rows: TokenRows, weights: LossWeights, counts: TokenCounts | None = None,
        teacher: Teacher | Sample | None = None,
        teacher_states: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Loss and metrics of B rows (see `loss.head_distillation_loss`).

        Args:
            rows: the tokens.
            weights: the terms.
            counts: what sums over tokens are divided by; None: the counts of `rows`.
            teacher: its final hidden states (B, T, Dt) and its head, or a sample; None if no KL
                term has a weight.
            teacher_states: its hidden states after every block, for SquareHead.
        """
        base = self._base[0]
        output = run_model(
            base, rows, output_hidden_states=weights.square_head > 0, **documents_of(base, rows)
        )
        if teacher_states is not None and self._kept_layers is not None:
            teacher_states = states_of_layers(teacher_states, self._kept_layers)
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
