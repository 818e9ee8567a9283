"""KL divergence of a model's predictions from its teacher's, chunk by chunk, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.data.rows import CHUNK_TOKENS, chunks
from sparsify.errors import InputError


@torch.no_grad()
def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Forward KL divergence from teacher to student, mean over tokens: float32 scalar, in nats.

    With p = softmax(z_t) and q = softmax(z_s) it is mean_n sum_v p (log p - log q).

    Args:
        student_logits: (..., V), any float dtype.
        teacher_logits: same shape.

    Raises:
        InputError: the shapes differ.

    Cost: a few float32 buffers of 1024 x V.
    """
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"distill: student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} differ; teacher and student must share the vocabulary"
        )
    z_s_NV, z_t_NV = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
    total = torch.zeros((), dtype=torch.float64, device=z_s_NV.device)
    for chunk in chunks(len(z_s_NV), CHUNK_TOKENS):
        log_q_CV = z_s_NV[chunk].float().log_softmax(dim=-1)
        log_p_CV = z_t_NV[chunk].float().log_softmax(dim=-1)
        divergence_C = log_q_CV.neg_().add_(log_p_CV).mul_(log_p_CV.exp_()).sum(dim=-1)
        total += divergence_C.double().sum()
    return (total / len(z_s_NV)).float()
