"""Softmax work of a language-model head for GPUs: one kernel per chunk of logits.

Knows nothing of losses' weights or of how values become terms: that is `head_terms`. Shape
suffixes: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels.triton_jit import jit, require_triton, tl

VALUES = (
    "max_s", "top_q", "max_t", "top_p", "dot_p", "dot_q", "drift", "agrees", "target", "max_1",
    "top_1",
)  # fmt: skip
"""what `differentiate_` records of a token, in this order"""

_WORDS = 2048  # of a row that a program holds at one time: 8 numbers of each tensor per thread


class Shares(NamedTuple):
    """What the terms' gradients are multiplied by, and how logits come from the heads' outputs."""

    kl: float
    reverse: float
    ce: float
    tau: float
    student: tuple[float, float | None]
    """scale and soft cap of its head; no cap: None"""
    teacher: tuple[float, float | None]


def differentiate_(
    u_s_CV: Tensor, u_t_CV: Tensor | None, grad_CV: Tensor, values_KC: Tensor,
    mass_C: Tensor | None, targets_C: Tensor | None, shares: Shares,
) -> None:  # fmt: skip
    """The values of every token, and the gradient with respect to the student's head's output.

    With z = cap tanh(scale u / cap) (or scale u) of each model, x = z_s / tau, y = z_t / tau, q =
    softmax(x), p = softmax(y) and c = softmax(z_s), a token's gradient is

        slope (mass (kl (q - p) + reverse q (x - y - E_q[x - y])) + ce (c - onehot)),

    slope = 1 - (z_s / cap)^2, or without a teacher mass kl q in place of the part in brackets. The
    first pass over a row finds the maxima and all sums at once, each rescaled when its maximum
    grows (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3); the second makes the
    gradient.

    Args:
        u_s_CV: float32, contiguous.
        u_t_CV: the same of the teacher; None: no teacher.
        grad_CV: overwritten, float32 or half precision; may be `u_s_CV` itself.
        values_KC: float32, a row for each of `VALUES` (see `head_terms`), rows any stride apart;
            what a term that is left out would need is left as it is.
        mass_C: float32, what the KL terms of a token are multiplied by; None: they are left out.
        targets_C: int64, below 0 where there is none; None: no cross-entropy.
        shares: the numbers above.

    Raises:
        InputError: Triton is not installed.

    Cost: every logit of both models is read twice, and a gradient written once; no memory. A
    softmax of the student's logits at tau 1 besides the one at tau takes arithmetic alone.
    """
    require_triton()
    num_tokens, num_words = u_s_CV.shape
    if not num_tokens:
        return
    scale_s, cap_s = shares.student
    scale_t, cap_t = shares.teacher
    with torch.cuda.device_of(u_s_CV):
        _head_kernel[(num_tokens,)](
            u_s_CV, u_s_CV if u_t_CV is None else u_t_CV, grad_CV, values_KC,
            u_s_CV if mass_C is None else mass_C, u_s_CV if targets_C is None else targets_C,
            num_words, values_KC.stride(0), scale_s, cap_s or 1.0, scale_t, cap_t or 1.0,
            1.0 / shares.tau, shares.kl, shares.reverse, shares.ce,
            HAS_CAP=cap_s is not None, HAS_TEACHER_CAP=cap_t is not None,
            HAS_TEACHER=u_t_CV is not None, HAS_MASS=mass_C is not None,
            HAS_TARGET=targets_C is not None,
            HAS_SECOND=targets_C is not None and shares.tau != 1, B=_WORDS, num_warps=8,
        )  # fmt: skip


@jit
def _logits(raw: tl.tensor, scale: tl.tensor, cap: tl.tensor, HAS_CAP: tl.constexpr) -> tl.tensor:
    """cap tanh(scale u / cap), or scale u.

    Near 0, where the exponential would leave few digits, tanh is its series: off by 2e-8 of it.
    """
    logits = raw * scale
    if HAS_CAP:
        ratio = logits / cap
        square = ratio * ratio
        series = 1.0 - square * (
            1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315 - square * (62.0 / 2835)))
        )
        small = tl.exp(-2.0 * tl.abs(ratio))
        size = (1.0 - small) / (1.0 + small)
        far = tl.where(ratio < 0, -size, size)
        # A NaN takes the second way, and stays one.
        logits = cap * tl.where(tl.abs(ratio) < 0.3, ratio * series, far)
    return logits


@jit
def _head_kernel(
    student_ptr: tl.tensor,
    teacher_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    values_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    target_ptr: tl.tensor,
    num_words: tl.tensor,
    value_stride: tl.tensor,
    scale_s: tl.tensor,
    cap_s: tl.tensor,
    scale_t: tl.tensor,
    cap_t: tl.tensor,
    per_tau: tl.tensor,
    kl: tl.tensor,
    reverse: tl.tensor,
    ce: tl.tensor,
    HAS_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """One token: B words at a time, twice.

    Sums are kept apart by place in the B words until the first pass is over, so that they are added
    up in a tree, and warps wait for each other only at maxima. Words beyond the last have a logit
    of minus infinity and no gap.
    """
    token = tl.program_id(0).to(tl.int64)  # 64-bit: tokens times words exceed 2^31
    student_row = student_ptr + token * num_words
    teacher_row = teacher_ptr + token * num_words
    words = tl.arange(0, B)
    nothing = float("-inf")
    # Finite: the distance of minus infinity from itself is not a number.
    max_s = tl.full((), -3.0e38, tl.float32)
    max_t, max_1 = max_s, max_s
    sum_s = tl.zeros((B,), dtype=tl.float32)
    sum_t, sum_1, dot_p, dot_q = sum_s, sum_s, sum_s, sum_s
    at_first = tl.full((), 0.0, tl.float32)  # x where the teacher's first maximum is
    target = tl.full((), -1, tl.int64)
    chosen = at_first
    if HAS_TARGET:
        # Read before warps meet in the first pass, and so before any of them writes a gradient.
        target = tl.load(target_ptr + token)
        at_target = tl.load(student_row + tl.maximum(target, 0))
        chosen = _logits(at_target, scale_s, cap_s, HAS_CAP)
    for start in range(0, num_words, B):
        word = start + words
        inside = word < num_words
        raw = tl.load(student_row + word, mask=inside, other=0.0)
        z = tl.where(inside, _logits(raw, scale_s, cap_s, HAS_CAP), nothing)
        x = z * per_tau
        new_s = tl.maximum(max_s, tl.max(x, axis=0))
        shrunk_s = tl.exp(max_s - new_s)
        power_s = tl.exp(x - new_s)
        sum_s = sum_s * shrunk_s + power_s
        if HAS_TEACHER:
            raw = tl.load(teacher_row + word, mask=inside, other=0.0)
            y = tl.where(inside, _logits(raw, scale_t, cap_t, HAS_TEACHER_CAP), nothing) * per_tau
            highest = tl.max(y, axis=0)
            if highest > max_t:
                first = tl.min(tl.where(y == highest, word, num_words), axis=0)
                at_first = tl.sum(tl.where(word == first, x, 0.0), axis=0)
            new_t = tl.maximum(max_t, highest)
            shrunk_t = tl.exp(max_t - new_t)
            power_t = tl.exp(y - new_t)
            gap = tl.where(inside, x - y, 0.0)
            sum_t = sum_t * shrunk_t + power_t
            dot_p = dot_p * shrunk_t + power_t * gap
            dot_q = dot_q * shrunk_s + power_s * gap
            max_t = new_t
        if HAS_SECOND:
            new_1 = tl.maximum(max_1, tl.max(z, axis=0))
            sum_1 = sum_1 * tl.exp(max_1 - new_1) + tl.exp(z - new_1)
            max_1 = new_1
        max_s = new_s
    values = values_ptr + token
    top_q = 1.0 / tl.sum(sum_s, axis=0)
    tl.store(values, max_s)
    tl.store(values + value_stride, top_q)
    mean_q = max_s
    top_p = top_q
    if HAS_TEACHER:
        top_p = 1.0 / tl.sum(sum_t, axis=0)
        mean_q = tl.sum(dot_q, axis=0) * top_q
        tl.store(values + 2 * value_stride, max_t)
        tl.store(values + 3 * value_stride, top_p)
        tl.store(values + 4 * value_stride, tl.sum(dot_p, axis=0) * top_p)
        tl.store(values + 5 * value_stride, mean_q)
        tl.store(values + 7 * value_stride, (at_first == max_s).to(tl.float32))
    top_1 = top_q
    if HAS_TARGET:
        tl.store(values + 8 * value_stride, chosen)
        if HAS_SECOND:
            top_1 = 1.0 / tl.sum(sum_1, axis=0)
            tl.store(values + 9 * value_stride, max_1)
            tl.store(values + 10 * value_stride, top_1)
    mass = tl.full((), 0.0, tl.float32)
    if HAS_MASS:
        mass = tl.load(mass_ptr + token)
    drift = tl.zeros((B,), dtype=tl.float32)
    for start in range(0, num_words, B):
        word = start + words
        inside = word < num_words
        raw = tl.load(student_row + word, mask=inside, other=0.0)
        z = tl.where(inside, _logits(raw, scale_s, cap_s, HAS_CAP), nothing)
        x = z * per_tau
        q = tl.exp(x - max_s) * top_q
        grad = tl.zeros((B,), dtype=tl.float32)
        if HAS_TEACHER:
            raw = tl.load(teacher_row + word, mask=inside, other=0.0)
            y = tl.where(inside, _logits(raw, scale_t, cap_t, HAS_TEACHER_CAP), nothing) * per_tau
            difference = q - tl.exp(y - max_t) * top_p
            drift += difference
            grad = kl * difference + reverse * (tl.where(inside, x - y, 0.0) - mean_q) * q
        elif HAS_MASS:
            grad = kl * q
        if HAS_MASS:
            grad = tl.where(mass != 0, mass * grad, 0.0)  # no product: it would keep NaN
        if HAS_TARGET:
            own = q
            if HAS_SECOND:
                own = tl.exp(z - max_1) * top_1
            grad += tl.where(target >= 0, ce * (own - (word == target).to(tl.float32)), 0.0)
        if HAS_CAP:
            grad *= 1.0 - (z / cap_s) * (z / cap_s)
        tl.store(grad_ptr + token * num_words + word, grad, mask=inside)
    if HAS_TEACHER:
        tl.store(values + 6 * value_stride, tl.sum(drift, axis=0))
