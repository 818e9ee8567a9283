"""Distillation losses against float64 references written from their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsify.distillation.loss import square_head
from sparsify.errors import InputError
from sparsify.evaluation.divergence import forward_kl
from sparsify.params import LossWeights

# Measured on the cases below: at most 4.4e-7 (loss) and 3.5e-7 (largest gradient error over largest
# gradient); float32 has a unit roundoff of 6e-8.
RELATIVE = 1e-6


def make_logits(shape: tuple[int, ...], spread: float, gap: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    teacher = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    student = teacher + gap * torch.randn(shape, generator=generator, dtype=torch.float64)
    # Values that float32 holds exactly: the reference must see the same input.
    return student.float().double(), teacher.float().double()


def reference_kl(student, teacher, temperature: float):
    """Sum over the vocabulary of p log(p / q), token by token, from softmax itself."""
    total = torch.zeros((), dtype=torch.float64)
    student, teacher = (z.reshape(-1, z.shape[-1]) for z in (student, teacher))
    num = 0
    for z_s, z_t in zip(student, teacher, strict=True):
        q = torch.exp(z_s / temperature) / torch.exp(z_s / temperature).sum()
        p = torch.exp(z_t / temperature) / torch.exp(z_t / temperature).sum()
        total = total + (p * torch.log(p / q)).sum()
        num += 1
    return temperature**2 * total / num


def loss_and_grad(function, logits):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def relative_error(got, expected) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_forward_kl_and_gradient_match_float64(temperature, chunk_tokens):
    student, teacher = make_logits((3, 7, 50), spread=3.0, gap=1.0)
    expected = loss_and_grad(lambda z: reference_kl(z, teacher, temperature), student)
    got = loss_and_grad(
        lambda z: forward_kl(z, teacher.float(), temperature, chunk_tokens),
        student.float(),
    )
    assert got[0].dtype == torch.float32
    assert relative_error(got[0], expected[0]) < RELATIVE
    assert relative_error(got[1], expected[1]) < RELATIVE


def test_gradient_is_the_slope_of_the_loss():
    """Central differences of the float64 reference, not of its formula for the gradient."""
    student, teacher = make_logits((2, 3, 11), spread=1.0, gap=0.5)
    _, grad = loss_and_grad(lambda z: forward_kl(z, teacher.float(), 2.0), student.float())
    step = 1e-5
    for index in ((0, 0, 0), (1, 2, 10), (0, 1, 4)):
        up, down = student.clone(), student.clone()
        up[index] += step
        down[index] -= step
        slope = (reference_kl(up, teacher, 2.0) - reference_kl(down, teacher, 2.0)) / (2 * step)
        assert grad[index].item() == pytest.approx(slope.item(), rel=1e-5)


def test_upstream_gradient_scales():
    student, teacher = make_logits((4, 13), spread=1.0, gap=1.0)
    z = student.float().requires_grad_()
    forward_kl(z, teacher.float()).mul(3.0).backward()
    _, once = loss_and_grad(lambda x: forward_kl(x, teacher.float()), student.float())
    torch.testing.assert_close(z.grad, 3 * once)


def test_kl_of_equal_logits_is_zero_and_direction_is_teacher_to_student():
    student, teacher = (z.float() for z in make_logits((6, 20), spread=2.0, gap=1.5))
    loss, grad = loss_and_grad(lambda z: forward_kl(z, student), student)
    assert loss == 0
    assert grad.abs().max() == 0
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert forward_kl(student, teacher).item() == pytest.approx(
        F.kl_div(q.log(), p, reduction="batchmean").item(), rel=1e-5
    )
    assert forward_kl(teacher, student).item() != pytest.approx(
        forward_kl(student, teacher).item(), rel=1e-2
    )


def test_temperature_factor_keeps_the_gradient_scale():
    """For tau far above the logits, tau^2 KL tends to half the variance of z_s - z_t."""
    student, teacher = make_logits((8, 40), spread=0.5, gap=0.5)
    difference = student - teacher
    limit = 0.5 * difference.var(dim=-1, unbiased=False).mean().item()
    # The next term of the expansion is of order 1/tau: measured 1.0e-3.
    assert forward_kl(student.float(), teacher.float(), 100.0).item() == pytest.approx(
        limit, rel=0.01
    )


def test_small_divergence_late_in_recovery():
    student, teacher = make_logits((256, 512), spread=3.0, gap=0.03)
    expected = loss_and_grad(lambda z: reference_kl(z, teacher, 1.0), student)
    got = loss_and_grad(lambda z: forward_kl(z, teacher.float()), student.float())
    # At KL 4e-4 the float32 log-probabilities cancel: measured 8e-6 (loss), 1.2e-5 (gradient).
    assert relative_error(got[0], expected[0]) < 5e-5
    assert relative_error(got[1], expected[1]) < 5e-5


def test_bfloat16_logits_are_computed_in_float32():
    student, teacher = (z.bfloat16() for z in make_logits((64, 300), spread=3.0, gap=0.1))
    expected = loss_and_grad(lambda z: reference_kl(z, teacher.double(), 1.0), student.double())
    got = loss_and_grad(lambda z: forward_kl(z, teacher), student)
    assert relative_error(got[0], expected[0]) < 1e-5  # measured 4e-7
    assert got[1].dtype == torch.bfloat16
    assert relative_error(got[1], expected[1]) < 2**-8  # one rounding to bfloat16, measured 2.4e-3


def test_teacher_gets_no_gradient_and_views_are_accepted():
    student, teacher = (z.float() for z in make_logits((5, 4, 30), spread=1.0, gap=1.0))
    base = student.clone().requires_grad_()
    teacher.requires_grad_()
    forward_kl(base.transpose(0, 1), teacher.transpose(0, 1)).backward()
    assert teacher.grad is None
    _, expected = loss_and_grad(lambda z: forward_kl(z, teacher), student)
    torch.testing.assert_close(base.grad, expected)


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
