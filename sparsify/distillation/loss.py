"""Losses that train a pruned student towards its dense teacher.

Shapes: N tokens, V vocabulary, B rows, T tokens per row, D hidden width. The losses over the
vocabulary run in float32 whatever the dtype of the logits, `chunk_tokens` tokens at a time, with
gradients in closed form, so that no float32 copy of the logits ever exists.

Where a document ends inside a row, the next token belongs to another one: that position teaches
nothing and is left out. Rows differ in how many positions that leaves, so a step that is made of
several micro-batches must divide their sums by one common number of tokens (`TokenCounts`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.data.rows import CHUNK_TOKENS, TokenRows
from sparsify.data.teacher_samples import Sample
from sparsify.distillation.head_loss import Teacher, head_loss
from sparsify.distillation.head_terms import NO_TARGET, TokenCounts
from sparsify.errors import InputError
from sparsify.models.lm_head import Head
from sparsify.params import LossWeights

# Floor of SquareHead's denominator: machine epsilon of bfloat16, as in the published recipe.
_SQUARE_HEAD_EPS = torch.finfo(torch.bfloat16).eps


def square_head(
    student_hidden: Sequence[torch.Tensor], teacher_hidden: Sequence[torch.Tensor],
    is_used_BT: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """SquareHead loss: squared distance of hidden states, relative to the teacher's size, summed.

    sum over blocks l of mean((h_s - h_t)^2) / (mean(h_t^2) + eps), eps the machine epsilon of
    bfloat16, in float32 (Kurtic et al. 2023, arXiv 2310.06927, equation 1, with the authors' eps).

    Args:
        student_hidden: hidden states of a Hugging Face output: the embedding's first (left out of
            the sum), then one (B, T, D) tensor per block.
        teacher_hidden: the same of the teacher; gets no gradient.
        is_used_BT: bool, the tokens that count; None: all.

    Returns:
        float32 scalar.

    Cost: about three float32 buffers of B x T x D per block are held for backward.
    """
    if [h.shape for h in student_hidden] != [h.shape for h in teacher_hidden]:
        raise InputError(
            f"distill.square_head_weight: the student has {len(student_hidden) - 1} blocks of "
            f"width {student_hidden[-1].shape[-1]}, the teacher {len(teacher_hidden) - 1} of "
            f"{teacher_hidden[-1].shape[-1]}; they must be equal, or set the weight to 0"
        )
    total = torch.zeros((), device=student_hidden[-1].device)
    for h_s, h_t in zip(student_hidden[1:], teacher_hidden[1:], strict=True):
        h_t = h_t.detach()
        if is_used_BT is not None:
            h_s, h_t = h_s[is_used_BT], h_t[is_used_BT]
        target = h_t.float()
        error = (h_s.float() - target).square().mean()
        total = total + error / (target.square().mean() + _SQUARE_HEAD_EPS)
    return total


def head_distillation_loss(
    hidden_BTD: Tensor,
    head: Head,
    rows: TokenRows,
    weights: LossWeights,
    counts: TokenCounts | None = None,
    teacher: Teacher | Sample | None = None,
    states: Sequence[Tensor] | None = None,
    teacher_states: Sequence[Tensor] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the terms that have a weight, from hidden states: no logits of all tokens.

    The KL terms cover all T positions of a row (no target is needed), cross-entropy the first
    T - 1, both without the last position of a document that ends inside the row. SquareHead covers
    all tokens; it is a ratio of means, so over several micro-batches it is the mean of theirs.
    Where answers are marked, the first two cover the positions before an answer's tokens, and
    SquareHead all documents that have one.

    Args:
        hidden_BTD: the student's final hidden states, those its head takes.
        head: the student's.
        rows: B rows of T tokens, what all hidden states were made from.
        weights: the terms.
        counts: what sums over tokens are divided by; None: the counts of `rows`.
        teacher: final hidden states (B, T, Dt) and head, or a sample of its predictions; None if no
            KL term has a weight.
        states: the student's hidden states after every block, if SquareHead has a weight.
        teacher_states: the same of the teacher.
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        The loss (float32 scalar with gradient), and the values of `head_loss.head_loss` with
        "square_head": detached scalars on the device of the hidden states.
    """
    values: dict[str, Tensor] = {}
    losses = []
    if weights.uses_teacher_logits or weights.ce:
        # Marking positions without a target, rather than cutting them out, keeps all in place.
        targets = rows.ids_NT.roll(-1, dims=1).masked_fill(~rows.has_next_NT, NO_TARGET)
        loss, values = head_loss(
            hidden_BTD, head, weights, counts or TokenCounts.of(rows), teacher, rows.is_taught_NT,
            targets, chunk_tokens,
        )  # fmt: skip
        losses.append(loss)
    if weights.square_head:
        assert states is not None, "SquareHead compares the states of both models"
        assert teacher_states is not None, "SquareHead compares the states of both models"
        term = square_head(states, teacher_states, rows.is_used_NT)
        losses.append(weights.square_head * term)
        values["square_head"] = term.detach()
    return torch.stack(losses).sum(), values
