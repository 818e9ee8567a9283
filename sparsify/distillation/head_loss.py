"""The losses over the vocabulary from hidden states, so that the logits of a batch never exist.

Owns the matrix products with the two models' heads, chunk by chunk of tokens, and the gradients,
which are made in closed form while a chunk's logits are there. `head_terms` owns what happens to
one chunk. Knows nothing of rows, documents or model families. Shape suffixes: N tokens, C tokens of
a chunk, V vocabulary, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsify.data.rows import CHUNK_TOKENS, chunks
from sparsify.data.teacher_samples import Sample
from sparsify.distillation.head_terms import TokenCounts, TokenTerms
from sparsify.errors import InputError
from sparsify.kernels.precision import float32_products
from sparsify.models.lm_head import Head
from sparsify.params import LossWeights

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Teacher:
    """A teacher's final hidden states and its head: plain tensors, whole on this device."""

    hidden_ND: Tensor
    """(..., D) in the order of the student's tokens; its width may differ from the student's"""
    head: Head


def head_loss(
    hidden: Tensor,
    head: Head,
    weights: LossWeights,
    counts: TokenCounts,
    teacher: Teacher | Sample | None = None,
    is_taught: Tensor | None = None,
    targets: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the losses over the vocabulary, from the hidden states before the head.

    With z = head(h), q = softmax(z / tau) of the student, p that of the teacher, and sums over the
    tokens that count:

        kl          tau^2 / counts.kl  sum_n sum_v p (log p - log q)   gradient tau (q - p)
        reverse_kl  tau^2 / counts.kl  sum_n sum_v q (log q - log p)   gradient tau q (r - E_q[r])
        ce          -1 / counts.ce     sum_n log softmax(z)[target]    gradient softmax(z) - onehot

    where r = log q - log p and the gradients are those of one token's sum with respect to z. The
    factor tau^2 keeps their size independent of tau (Hinton et al. 2015, arXiv 1503.02531, section
    2.1). Gradients of the hidden states, the weight and the bias are made here, in the forward
    pass; the backward pass only scales them. So nothing of the head is needed any more once this
    returns, which is what ZeRO-3 asks for.

    Arithmetic: logits, probabilities and losses are float32 (float64 for float64 inputs), token
    losses are added in float64, the weight's gradient is summed over chunks in float32. Half
    precision on a GPU is multiplied on tensor cores into float32, for which the gradient of the
    logits, unscaled, is rounded once to the hidden states' type. On a CPU chunks, and one copy of
    each weight, are converted to float32.

    Args:
        hidden: (..., D) student hidden states, any float dtype.
        head: of the student; its weight and bias are given their gradients.
        weights: the terms; `square_head` is not one of these.
        counts: what the sums are divided by: the counts of the whole batch, not of this part.
        teacher: needed by the two KL terms; its head is not computed if neither has a weight. With
            a `Sample` the kl term is an unbiased estimate.
        is_taught: bool (...), the tokens of the KL terms; None: all.
        targets: int64 (...), the token that comes next, NO_TARGET where none does; needed by ce.
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        The loss, a float32 scalar with gradient, and as detached float32 scalars the unweighted
        "kl", "reverse_kl", "agreement" (share of taught tokens whose likeliest next token is the
        teacher's) and "ce", each divided by its count; what was not computed is absent. "ce" comes
        free at tau = 1 and is otherwise computed only if it has a weight.

    Raises:
        InputError: vocabularies differ, a term lacks what it needs, or no token counts.

    Cost: 2 V D operations per token for each of the student's three products and the teacher's one,
    and what `TokenTerms.differentiate_` says of the work between them; of C x V float32 on a GPU
    two buffers and a half (two in float32), else two, and V x D float32 for the weight's gradient
    (2.1 GB for Llama 3.1 8B; on a CPU as much again for each weight in half precision). Nothing
    grows with N x V.
    """
    _check(head, weights, counts, teacher, targets)
    tokens = hidden.shape[:-1]
    if not weights.uses_teacher_logits:
        teacher = None
    like = hidden.new_empty((), dtype=_dtype_of(hidden))
    terms = TokenTerms(
        tokens.numel(), weights, counts, head.transform,
        teacher.head.transform if isinstance(teacher, Teacher) else teacher,
        None if is_taught is None else _per_token(is_taught, tokens, "is_taught"),
        None if targets is None else _per_token(targets, tokens, "targets"), like,
    )  # fmt: skip
    states = teacher if isinstance(teacher, Teacher) else None
    names: list[str] = []
    loss, *values = _HeadLoss.apply(
        hidden, head.weight_VD, head.bias_V, terms, states, chunk_tokens, names,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return loss, dict(zip(names, values, strict=True))


def _check(
    head: Head, weights: LossWeights, counts: TokenCounts, teacher: Teacher | Sample | None,
    targets: Tensor | None,
) -> None:  # fmt: skip
    if teacher is None and weights.uses_teacher_logits:
        raise InputError(
            "distill: the KL terms need a teacher; give one, or set their weights to 0"
        )
    if targets is None and weights.ce:
        raise InputError("distill: cross-entropy needs the next tokens; give targets")
    if isinstance(teacher, Sample):
        if weights.reverse_kl:
            raise InputError(
                "distill.reverse_kl_weight: a sample of the teacher says nothing of tokens that it "
                "does not hold; set the weight to 0, or use the teacher itself"
            )
        if weights.temperature != teacher.temperature:
            raise InputError(
                f"distill.temperature={weights.temperature:g}: the teacher's sample was drawn at "
                f"{teacher.temperature:g}; use that, or draw another sample"
            )
    elif teacher is not None and len(teacher.head.weight_VD) != len(head.weight_VD):
        raise InputError(
            f"distill: the student has {len(head.weight_VD)} tokens, the teacher "
            f"{len(teacher.head.weight_VD)}; teacher and student must share the vocabulary"
        )
    for name, count, is_used in (
        ("KL", counts.kl, weights.uses_teacher_logits), ("cross-entropy", counts.ce, weights.ce),
    ):  # fmt: skip
        if is_used and not count > 0:
            raise InputError(
                f"distill: no token counts for the {name} term; the rows hold no document of two "
                "tokens or more: use other data, or set the term's weight to 0"
            )


def _dtype_of(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _per_token(values: Tensor, tokens: torch.Size, name: str) -> Tensor:
    assert values.shape == tokens, f"{name} is {tuple(values.shape)}, tokens are {tuple(tokens)}"
    return values.flatten()


class HeadProducts:
    """The products of one model's chunks of hidden states with its head, and the ways back.

    Attributes:
        hidden_ND: all hidden states, in their own type.
    """

    def __init__(self, hidden: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.hidden_ND = hidden.detach().flatten(0, -2)
        weight_VD = weight_VD.detach()
        # Tensor cores multiply half precision exactly and sum in float32.
        self._is_half = weight_VD.is_cuda and weight_VD.dtype in _HALF
        self._is_half = self._is_half and weight_VD.dtype == hidden.dtype
        self._weight_VD = weight_VD if self._is_half else weight_VD.to(dtype)

    def chunk(self, tokens: slice) -> Tensor:
        """Hidden states of a chunk in the type in which they are multiplied."""
        hidden_CD = self.hidden_ND[tokens]
        return hidden_CD if self._is_half else hidden_CD.to(self._dtype)

    def logits_(self, out_CV: Tensor, hidden_CD: Tensor, bias_V: Tensor | None) -> Tensor:
        """h W^T + b."""
        if self._is_half:
            torch.mm(hidden_CD, self._weight_VD.T, out_dtype=out_CV.dtype, out=out_CV)
        else:
            torch.mm(hidden_CD, self._weight_VD.T, out=out_CV)
        if bias_V is not None:
            out_CV += bias_V.detach()
        return out_CV

    def half_buffer(self, num_tokens: int) -> Tensor | None:
        """Memory for a chunk's gradient in the type in which it is multiplied, if that is half
        precision."""
        if not self._is_half:
            return None
        return self._weight_VD.new_empty((num_tokens, len(self._weight_VD)))

    def rounded(self, grad_CV: Tensor) -> Tensor:
        """A gradient of logits in the type in which it is multiplied, once for both products."""
        return grad_CV.to(self._weight_VD.dtype) if self._is_half else grad_CV

    def hidden_grad_(self, out_CD: Tensor, grad_CV: Tensor, factor: float) -> None:
        """factor G W, of a gradient from `rounded`."""
        if self._is_half:
            product = torch.mm(grad_CV, self._weight_VD, out_dtype=self._dtype)
            torch.mul(product, factor, out=out_CD)
        elif out_CD.dtype == self._dtype:
            out_CD.addmm_(grad_CV, self._weight_VD, beta=0, alpha=factor)
        else:
            torch.mul(torch.mm(grad_CV, self._weight_VD), factor, out=out_CD)

    def add_weight_grad_(
        self, sum_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor, factor: float
    ) -> None:
        """Add factor G^T h, of a gradient from `rounded`."""
        if self._is_half:
            torch.addmm(
                sum_VD, grad_CV.T, hidden_CD, out_dtype=sum_VD.dtype, alpha=factor, out=sum_VD
            )
        else:
            sum_VD.addmm_(grad_CV.T, hidden_CD, alpha=factor)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, terms: TokenTerms,
        teacher: Teacher | None, chunk_tokens: int, names: list[str], wants_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        of_hidden, of_weight, of_bias = (wants_grad and n for n in ctx.needs_input_grad[:3])
        dtype = _dtype_of(hidden)
        with torch.autocast(hidden.device.type, enabled=False), float32_products():
            student = HeadProducts(hidden, weight_VD, dtype)
            other = teacher and HeadProducts(teacher.hidden_ND, teacher.head.weight_VD, dtype)
            num_tokens, num_words = len(student.hidden_ND), len(weight_VD)
            shape = (min(chunk_tokens, num_tokens), num_words)
            z_s_CV = hidden.new_empty(shape, dtype=dtype)
            z_t_CV = hidden.new_empty(shape, dtype=dtype) if other else None
            # A bias gets the gradient's sum, which is to be that of numbers that were not rounded.
            half_CV = None if of_bias else student.half_buffer(shape[0])
            grad_ND = torch.empty_like(student.hidden_ND) if of_hidden else None
            grad_VD = torch.zeros_like(weight_VD, dtype=dtype) if of_weight else None
            grad_V = hidden.new_zeros(num_words, dtype=dtype) if of_bias else None
            for tokens in chunks(num_tokens, chunk_tokens):
                num_rows = tokens.stop - tokens.start
                hidden_CD = student.chunk(tokens)
                z_CV = student.logits_(z_s_CV[:num_rows], hidden_CD, bias_V)
                taught_CV = None
                if other and teacher and z_t_CV is not None:
                    states_CD = other.chunk(tokens)
                    taught_CV = other.logits_(z_t_CV[:num_rows], states_CD, teacher.head.bias_V)
                half = None if half_CV is None else half_CV[:num_rows]
                slope_CV = terms.differentiate_(tokens, z_CV, taught_CV, half)
                if grad_V is not None:
                    grad_V.add_(slope_CV.sum(0), alpha=terms.factor)
                slope_CV = student.rounded(slope_CV)
                if grad_ND is not None:
                    student.hidden_grad_(grad_ND[tokens], slope_CV, terms.factor)
                if grad_VD is not None:
                    student.add_weight_grad_(grad_VD, slope_CV, hidden_CD, terms.factor)
            loss, values = terms.finish()
        names += values
        grad = None if grad_ND is None else grad_ND.view(hidden.shape)
        ctx.save_for_backward(grad, grad_VD, grad_V)
        ctx.dtypes = (hidden.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(*values.values())
        ctx.set_materialize_grads(False)
        return loss, *values.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        if grad_loss is None:
            return (None,) * 8
        # In place: the weight's gradient is the largest thing here. A second backward pass through
        # the same graph is refused by autograd, which sees that its saved tensors have changed.
        grads = [
            None if grad is None else grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None, None, None
