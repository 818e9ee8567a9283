"""Distillation losses against float64 references written from their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsify.distillation.loss import square_head
from sparsify.errors import InputError
from sparsify.evaluation.divergence import forward_kl
from sparsify.params import LossWeights

# Measured on the cases below: at most 4.4e-7; float32 has a unit roundoff of 6e-8.
RELATIVE = 1e-6


def make_logits(shape: tuple[int, ...], spread: float, gap: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    teacher = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    student = teacher + gap * torch.randn(shape, generator=generator, dtype=torch.float64)
    # Values that float32 holds exactly: the reference must see the same input.
    return student.float().double(), teacher.float().double()


def reference_kl(student, teacher):
    """Sum over the vocabulary of p log(p / q), token by token, from softmax itself."""
    total = torch.zeros((), dtype=torch.float64)
    student, teacher = (z.reshape(-1, z.shape[-1]) for z in (student, teacher))
    num = 0
    for z_s, z_t in zip(student, teacher, strict=True):
        q = torch.exp(z_s) / torch.exp(z_s).sum()
        p = torch.exp(z_t) / torch.exp(z_t).sum()
        total = total + (p * torch.log(p / q)).sum()
        num += 1
    return total / num


def relative_error(got, expected) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_forward_kl_matches_float64(chunk_tokens, monkeypatch):
    monkeypatch.setattr("sparsify.evaluation.divergence.CHUNK_TOKENS", chunk_tokens)
    student, teacher = make_logits((3, 7, 50), spread=3.0, gap=1.0)
    got = forward_kl(student.float(), teacher.float())
    assert got.dtype == torch.float32
    assert relative_error(got, reference_kl(student, teacher)) < RELATIVE


def test_kl_of_equal_logits_is_zero_and_direction_is_teacher_to_student():
    student, teacher = (z.float() for z in make_logits((6, 20), spread=2.0, gap=1.5))
    assert forward_kl(student, student) == 0
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert forward_kl(student, teacher).item() == pytest.approx(
        F.kl_div(q.log(), p, reduction="batchmean").item(), rel=1e-5
    )
    assert forward_kl(teacher, student).item() != pytest.approx(
        forward_kl(student, teacher).item(), rel=1e-2
    )


def test_small_divergence_late_in_recovery():
    student, teacher = make_logits((256, 512), spread=3.0, gap=0.03)
    got = forward_kl(student.float(), teacher.float())
    # At KL 4e-4 the float32 log-probabilities cancel: measured 8e-6.
    assert relative_error(got, reference_kl(student, teacher)) < 5e-5


def test_bfloat16_logits_are_computed_in_float32():
    student, teacher = (z.bfloat16() for z in make_logits((64, 300), spread=3.0, gap=0.1))
    got = forward_kl(student, teacher)
    assert relative_error(got, reference_kl(student.double(), teacher.double())) < 1e-5


def test_logits_with_gradients_and_views_are_accepted():
    student, teacher = (z.float() for z in make_logits((5, 4, 30), spread=1.0, gap=1.0))
    got = forward_kl(student.requires_grad_().transpose(0, 1), teacher.transpose(0, 1))
    assert not got.requires_grad
    assert got.item() == pytest.approx(forward_kl(student, teacher).item(), rel=1e-6)


def test_vocabularies_must_agree():
    with pytest.raises(InputError, match="share the vocabulary"):
        forward_kl(torch.zeros(2, 5), torch.zeros(2, 6))


def test_square_head_formula():
    generator = torch.Generator().manual_seed(2)
    teacher = [torch.randn(2, 5, 8, generator=generator) * scale for scale in (9.0, 0.05, 4.0)]
    student = [h + 0.1 * torch.randn(2, 5, 8, generator=generator) for h in teacher]
    expected = 0.0
    for h_s, h_t in list(zip(student, teacher, strict=True))[1:]:
        s, t = h_s.double(), h_t.double()
        expected += (((s - t) ** 2).mean() / ((t**2).mean() + 0.0078125)).item()
    assert square_head(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_square_head_gives_the_student_a_gradient_only():
    teacher = [torch.randn(1, 3, 4, requires_grad=True) for _ in range(2)]
    student = [torch.randn(1, 3, 4, requires_grad=True) for _ in range(2)]
    square_head(student, teacher).backward()
    assert student[1].grad.abs().sum() > 0
    assert student[0].grad is None  # the embedding's output is no term
    assert all(h.grad is None for h in teacher)
    with pytest.raises(InputError, match="must be equal"):
        square_head(student, teacher[:1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl": 0.0}, "nothing to train on"),
        ({"ce": -1.0}, "ce_weight"),
        ({"square_head": float("nan")}, "square_head_weight"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_weights_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        LossWeights(**values)
