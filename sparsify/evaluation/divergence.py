"""KL divergence of a model's predictions from its teacher's, chunk by chunk, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from sparsify.errors import InputError

if TYPE_CHECKING:
    pass

CHUNK_TOKENS = 1024


def forward_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
    is_counted: torch.Tensor | None = None,
    num_tokens: float | None = None,
) -> torch.Tensor:
    """Forward KL divergence from teacher to student, mean over tokens, times temperature squared.

    With p = softmax(z_t / tau) and q = softmax(z_s / tau) it is tau^2 * mean_n sum_v p (log p -
    log q). The factor tau^2 keeps the size of the gradient independent of tau (Hinton et al. 2015,
    arXiv 1503.02531, section 2.1). The gradient with respect to z_s is tau * (q - p) / N, and zero
    at tokens that are not counted.

    Args:
        student_logits: (..., V), any float dtype.
        teacher_logits: same shape; gets no gradient.
        temperature: tau > 0.
        chunk_tokens: tokens whose float32 probabilities exist at one time.
        is_counted: bool (...), the tokens of the sum; None: all.
        num_tokens: N, what the sum is divided by; None: the number of counted tokens.

    Returns:
        float32 scalar.

    Cost: a few float32 buffers of chunk_tokens x V in forward and in backward, and the gradient in
    the dtype of the student's logits; probabilities are computed again in backward.
    """
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"distill: student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} differ; teacher and student must share the vocabulary"
        )
    if is_counted is None:
        is_counted = student_logits.new_ones(student_logits.shape[:-1], dtype=torch.bool)
    if num_tokens is None:
        num_tokens = int(is_counted.sum())
    return _ForwardKL.apply(
        student_logits, teacher_logits.detach(), temperature, chunk_tokens, is_counted, num_tokens
    )


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, start + chunk_tokens)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
        is_counted: torch.Tensor,
        num_tokens: float,
    ) -> torch.Tensor:
        z_s, z_t = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
        counted = is_counted.flatten()
        total = torch.zeros((), dtype=torch.float64, device=z_s.device)
        for chunk in _chunks(len(z_s), chunk_tokens):
            log_q = (z_s[chunk].float() / temperature).log_softmax(dim=-1)
            log_p = (z_t[chunk].float() / temperature).log_softmax(dim=-1)
            divergence = log_q.neg_().add_(log_p).mul_(log_p.exp_()).sum(dim=-1)
            total += divergence[counted[chunk]].double().sum()
        ctx.save_for_backward(student_logits, teacher_logits, counted)
        ctx.temperature, ctx.chunk_tokens, ctx.num_tokens = temperature, chunk_tokens, num_tokens
        return (total * temperature**2 / num_tokens).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        student_logits, teacher_logits, counted = ctx.saved_tensors
        grad = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
        z_s, z_t = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
        rows = grad.flatten(0, -2)  # a view: `grad` is contiguous
        scale = grad_output.float() * ctx.temperature / ctx.num_tokens
        for chunk in _chunks(len(z_s), ctx.chunk_tokens):
            q = (z_s[chunk].float() / ctx.temperature).softmax(dim=-1)
            p = (z_t[chunk].float() / ctx.temperature).softmax(dim=-1)
            rows[chunk] = q.sub_(p).mul_(scale).masked_fill_(~counted[chunk, None], 0.0)
        return grad, None, None, None, None, None
