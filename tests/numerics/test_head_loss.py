"""The chunked head against a float64 reference: autograd through all logits at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparsify.data.rows import TokenRows
from sparsify.distillation import head_loss as head_module
from sparsify.distillation.head_loss import Teacher, head_loss
from sparsify.distillation.head_terms import NO_TARGET, TokenCounts
from sparsify.distillation.loss import head_distillation_loss
from sparsify.errors import InputError
from sparsify.models.lm_head import Head, HeadTransform
from sparsify.params import LossSchedule, LossWeights

# Loss: |a - b| / |b|. Gradients: Frobenius norm of the error over that of the gradient. Measured on
# the cases below, with logits up to 7: at most 1.7e-7 (loss) and 7.3e-7 (gradients). What is left
# is the rounding of the logits to float32: it grows with their size over the temperature.
RELATIVE = 1e-6

WEIGHTS = {
    "forward": LossWeights(),
    "forward, warm": LossWeights(temperature=2.5),
    "reverse": LossWeights(kl=0.0, reverse_kl=1.0),
    "reverse, cold": LossWeights(kl=0.0, reverse_kl=0.6, temperature=0.7),
    "ce": LossWeights(kl=0.0, ce=1.0),
    "ce, warm": LossWeights(kl=0.0, ce=1.0, temperature=2.0),
    "both KL": LossWeights(kl=0.3, reverse_kl=0.9),
    "kl and ce": LossWeights(kl=1.0, ce=0.4),
    "all, warm": LossWeights(kl=0.5, ce=0.2, temperature=1.5, reverse_kl=0.4),
}
TRANSFORMS = {
    "plain": HeadTransform(),
    "scaled": HeadTransform(scale=0.25),
    "capped": HeadTransform(soft_cap=4.0),
    "scaled and capped": HeadTransform(scale=2.0, soft_cap=5.0),
}


@dataclass
class Problem:
    """Float32 tensors of a student and a wider teacher, with tokens that do not count."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    teacher: Teacher
    is_taught: torch.Tensor
    targets: torch.Tensor
    counts: TokenCounts


def make_problem(num_tokens: int = 37, num_words: int = 211, gap: float = 1.0) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    states, weight = normal(num_tokens, 24), normal(num_words, 24, scale=0.3)
    is_taught = torch.rand(num_tokens, generator=generator) > 0.2
    targets = torch.randint(num_words, (num_tokens,), generator=generator)
    targets[::5] = NO_TARGET
    teacher = Teacher(
        torch.cat([states, normal(num_tokens, 8)], 1),
        Head(torch.cat([weight, normal(num_words, 8, scale=0.3 * gap)], 1), normal(num_words)),
    )
    bias = normal(num_words)
    counts = TokenCounts(kl=30.0, ce=25.0)  # of a batch that this is a part of
    return Problem(states, weight, bias, teacher, is_taught, targets, counts)


def transformed(transform: HeadTransform, logits: torch.Tensor) -> torch.Tensor:
    logits = logits * transform.scale
    cap = transform.soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def reference(
    problem: Problem, weights: LossWeights, transform: HeadTransform
) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
    """Loss, terms and gradients (hidden, weight, bias) from the definitions, in float64."""
    leaves = [
        None if x is None else x.detach().double().requires_grad_()
        for x in (problem.hidden, problem.weight, problem.bias)
    ]
    hidden, weight, bias = leaves
    z_s = hidden @ weight.T + (0.0 if bias is None else bias)
    other = problem.teacher.head
    z_t = problem.teacher.hidden_ND.double() @ other.weight_VD.double().T
    z_t = transformed(other.transform, z_t + (0.0 if other.bias_V is None else other.bias_V))
    z_s = transformed(transform, z_s)
    tau, taught = weights.temperature, problem.is_taught
    q, p = (torch.exp(z / tau) / torch.exp(z / tau).sum(-1, keepdim=True) for z in (z_s, z_t))
    counted = problem.targets != NO_TARGET
    chosen = z_s.softmax(-1)[counted, problem.targets[counted]]
    terms = {
        "kl": tau**2 * (p * (p / q).log()).sum(-1)[taught].sum() / problem.counts.kl,
        "reverse_kl": tau**2 * (q * (q / p).log()).sum(-1)[taught].sum() / problem.counts.kl,
        "ce": -chosen.log().sum() / problem.counts.ce,
        "agreement": (z_s.argmax(-1) == z_t.argmax(-1))[taught].sum() / problem.counts.kl,
    }
    loss = sum(getattr(weights, name) * terms[name] for name in ("kl", "reverse_kl", "ce"))
    leaves = [leaf for leaf in leaves if leaf is not None]
    return loss.detach(), terms, list(torch.autograd.grad(loss, leaves))


def computed(
    problem: Problem, weights: LossWeights, transform: HeadTransform, chunk_tokens: int = 8,
    **changes: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """The same by `head_loss`."""
    leaves = [
        None if x is None else x.detach().clone().requires_grad_()
        for x in (problem.hidden, problem.weight, problem.bias)
    ]
    arguments = {
        "teacher": problem.teacher, "is_taught": problem.is_taught, "targets": problem.targets,
    }  # fmt: skip
    loss, terms = head_loss(
        leaves[0], Head(leaves[1], leaves[2], transform), weights, problem.counts,
        chunk_tokens=chunk_tokens, **(arguments | changes),
    )  # fmt: skip
    loss.backward()
    return loss.detach(), terms, [leaf.grad for leaf in leaves if leaf is not None]


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_and_gradients_match_float64(weights, transform):
    problem = make_problem()
    weights, transform = WEIGHTS[weights], TRANSFORMS[transform]
    other = replace(problem.teacher.head, transform=HeadTransform(scale=0.5, soft_cap=6.0))
    problem.teacher = replace(problem.teacher, head=other)
    loss, terms, grads = reference(problem, weights, transform)
    for chunk_tokens in (1, 8, 37, 1000):
        got_loss, got_terms, got_grads = computed(problem, weights, transform, chunk_tokens)
        assert got_loss.dtype == torch.float32
        assert distance(got_loss, loss) < RELATIVE
        for got, expected in zip(got_grads, grads, strict=True):
            assert distance(got, expected) < RELATIVE
        for name, value in got_terms.items():
            assert distance(value, terms[name]) < RELATIVE, name
    compares = {"kl", "reverse_kl", "agreement"} if weights.uses_teacher_logits else set()
    has_ce = weights.ce > 0 or weights.temperature == 1
    assert got_terms.keys() == compares | ({"ce"} if has_ce else set())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_formulas_hold_to_float64(weights):
    """With float64 inputs all is float64: what is left is rounding, not a wrong formula."""
    problem, transform = make_problem(), TRANSFORMS["scaled and capped"]
    problem.hidden, problem.weight = problem.hidden.double(), problem.weight.double()
    problem.bias = problem.bias.double()
    head = problem.teacher.head
    head = Head(head.weight_VD.double(), head.bias_V.double())
    problem.teacher = Teacher(problem.teacher.hidden_ND.double(), head)
    loss, _, grads = reference(problem, WEIGHTS[weights], transform)
    got_loss, _, got_grads = computed(problem, WEIGHTS[weights], transform)
    assert distance(got_loss, loss) < 1e-14
    for got, expected in zip(got_grads, grads, strict=True):
        assert distance(got, expected) < 1e-14  # measured 1.5e-15


def test_late_in_recovery():
    """Two models that nearly agree: the loss stays good where it is a small difference."""
    problem = make_problem(num_words=4000, gap=0.01)
    problem.teacher.head.bias_V.copy_(problem.bias)
    loss, _, grads = reference(problem, LossWeights(), HeadTransform())
    got_loss, _, got_grads = computed(problem, LossWeights(), HeadTransform())
    assert 1e-5 < loss < 1e-2
    # The logits themselves are rounded to float32; measured 1.2e-5 (loss) and 5e-5 (gradients).
    assert distance(got_loss, loss) < 5e-5
    for got, expected in zip(got_grads, grads, strict=True):
        assert distance(got, expected) < 1e-4


@pytest.mark.parametrize("weights", ["forward", "all, warm"])
def test_half_precision_is_computed_in_float32(weights):
    problem = make_problem()
    half = [x.bfloat16() for x in (problem.hidden, problem.weight, problem.bias)]
    head = problem.teacher.head
    teacher = Teacher(
        problem.teacher.hidden_ND.bfloat16(),
        Head(head.weight_VD.bfloat16(), head.bias_V.bfloat16()),
    )
    problem.hidden, problem.weight, problem.bias = half
    problem.teacher = teacher
    loss, _, grads = reference(problem, WEIGHTS[weights], HeadTransform())
    got_loss, _, got_grads = computed(problem, WEIGHTS[weights], HeadTransform())
    assert got_loss.dtype == torch.float32
    assert distance(got_loss, loss) < RELATIVE
    for got, expected in zip(got_grads, grads, strict=True):
        assert got.dtype == torch.bfloat16
        assert distance(got, expected) < 2**-8  # one rounding to bfloat16, measured 1.7e-3


def test_gradient_is_the_slope_of_the_loss():
    """Central differences of the loss itself in float64, in one direction of each input."""
    problem, weights = make_problem(num_tokens=5, num_words=13), WEIGHTS["all, warm"]
    problem.targets[0] = 3
    transform = TRANSFORMS["scaled and capped"]
    names, step = ("hidden", "weight", "bias"), 1e-6
    for name in names:
        setattr(problem, name, getattr(problem, name).double())
    grads = computed(problem, weights, transform)[2]
    for name, grad in zip(names, grads, strict=True):
        value = getattr(problem, name)
        direction = torch.randn_like(value)
        setattr(problem, name, value + step * direction)
        up = computed(problem, weights, transform)[0]
        setattr(problem, name, value - step * direction)
        down = computed(problem, weights, transform)[0]
        setattr(problem, name, value)
        slope = ((up - down) / (2 * step)).item()
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize("weights", ["forward", "both KL", "all, warm"])
def test_tokens_that_do_not_count_have_no_part(weights):
    problem, weights = make_problem(), WEIGHTS[weights]
    problem.targets[~problem.is_taught] = NO_TARGET
    out = (~problem.is_taught).nonzero()[:, 0]
    loss, _, (of_hidden, of_weight, _) = computed(problem, weights, HeadTransform())
    assert len(out) > 3
    assert torch.count_nonzero(of_hidden[out]) == 0
    assert torch.count_nonzero(of_hidden).item() == of_hidden[problem.is_taught].numel()
    problem.hidden[out] *= 3
    problem.teacher.hidden_ND[out] += 1
    changed_loss, _, (_, changed_weight, _) = computed(problem, weights, HeadTransform())
    assert changed_loss == loss
    assert torch.equal(changed_weight, of_weight)


def test_chunks_change_nothing_but_rounding():
    problem, weights = make_problem(), WEIGHTS["all, warm"]
    expected = computed(problem, weights, HeadTransform(), chunk_tokens=37)
    for chunk_tokens in (1, 2, 5, 36, 38):
        got = computed(problem, weights, HeadTransform(), chunk_tokens)
        assert distance(got[0], expected[0].double()) < 1e-7
        for one, other in zip(got[2], expected[2], strict=True):
            assert distance(one, other.double()) < RELATIVE  # measured 1.4e-7
    again = computed(problem, weights, HeadTransform(), chunk_tokens=37)
    assert all(torch.equal(a, b) for a, b in zip(again[2], expected[2], strict=True))


def test_tied_weights_get_both_gradients():
    """The embedding looks tokens up and is the head; its gradient is the sum of both uses."""
    problem, weights = make_problem(), LossWeights(kl=1.0, ce=0.5)
    ids = problem.targets.clamp(min=0)
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(3)) / 5

    def gradient(weight, loss_of):
        leaf = weight.clone().requires_grad_()
        loss_of(torch.tanh(leaf[ids] @ mix.to(leaf.dtype)), leaf).backward()
        return leaf.grad

    def ours(hidden, weight):
        return head_loss(
            hidden, Head(weight), weights, problem.counts, problem.teacher, problem.is_taught,
            problem.targets, chunk_tokens=8,
        )[0]  # fmt: skip

    def theirs(hidden, weight):
        logits = hidden @ weight.T
        log_q = logits.log_softmax(-1)
        log_p = problem.teacher.head.logits(problem.teacher.hidden_ND.double()).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[problem.is_taught].sum() / 30
        return kl + 0.5 * F.cross_entropy(logits, problem.targets, reduction="sum") / 25

    got, expected = gradient(problem.weight, ours), gradient(problem.weight.double(), theirs)
    assert distance(got, expected) < RELATIVE


class CountingProducts:
    """Counts what kinds of products are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("logits_", "hidden_grad_", "add_weight_grad_"):
            real = getattr(head_module.HeadProducts, name)

            def counted(product, *args, _real=real, _name=name):
                self.names.append(_name)
                return _real(product, *args)

            monkeypatch.setattr(head_module.HeadProducts, name, counted)

    def taken(self) -> dict[str, int]:
        names, self.names = self.names, []
        return {name: names.count(name) for name in dict.fromkeys(names)}


def test_terms_without_weight_cost_no_product(monkeypatch):
    problem, count = make_problem(num_tokens=16), CountingProducts(monkeypatch)
    back = {"hidden_grad_": 2, "add_weight_grad_": 2}
    computed(problem, LossWeights(), HeadTransform())
    assert count.taken() == {"logits_": 4} | back  # two chunks, two models
    computed(problem, LossWeights(kl=0.0, ce=1.0), HeadTransform())
    assert count.taken() == {"logits_": 2} | back
    computed(problem, LossWeights(kl=0.0, ce=1.0), HeadTransform(), teacher=None)
    assert count.taken() == {"logits_": 2} | back
    with torch.no_grad():
        head_loss(
            problem.hidden, Head(problem.weight.requires_grad_()), LossWeights(), problem.counts,
            problem.teacher, chunk_tokens=8,
        )  # fmt: skip
    assert count.taken() == {"logits_": 4}


def test_cross_entropy_is_left_out_where_it_costs_a_softmax(monkeypatch):
    problem, weights = make_problem(), LossWeights(temperature=2.0)
    called = []
    real = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda *a, **k: called.append(1) or real(*a, **k))
    _, terms, _ = computed(problem, weights, HeadTransform(), chunk_tokens=37)
    assert "ce" not in terms
    assert len(called) == 2  # one of each model


def test_backward_scales_and_runs_once():
    problem = make_problem()
    _, _, once = computed(problem, LossWeights(), HeadTransform())
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    loss, terms = head_loss(
        hidden, Head(weight, problem.bias), LossWeights(), problem.counts, problem.teacher,
        problem.is_taught, problem.targets,
    )  # fmt: skip
    assert not any(term.requires_grad for term in terms.values())
    loss.mul(3.0).backward(retain_graph=True)
    assert distance(hidden.grad, 3 * once[0].double()) < 1e-6
    assert distance(weight.grad, 3 * once[1].double()) < 1e-6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_changes_nothing():
    problem = make_problem()
    expected = computed(problem, LossWeights(), HeadTransform())
    with torch.autocast("cpu", torch.bfloat16):
        got = computed(problem, LossWeights(), HeadTransform())
    assert got[0] == expected[0]
    assert torch.equal(got[2][1], expected[2][1])


def test_equal_models():
    problem = make_problem()
    problem.teacher = Teacher(problem.hidden, Head(problem.weight, problem.bias))
    loss, terms, grads = computed(problem, LossWeights(), HeadTransform())
    assert loss == 0
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)
    expected = problem.is_taught.sum().item() / problem.counts.kl
    assert terms["agreement"].item() == pytest.approx(expected)


def packed_rows() -> TokenRows:
    """4 x 6 tokens: documents of 6; 2, 4; 1, 4, 1; 5, 1 tokens."""
    positions_NT = torch.tensor(
        [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3], [0, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0]]
    )
    ids_NT = torch.randint(19, (4, 6), generator=torch.Generator().manual_seed(4))
    return TokenRows(ids_NT, positions_NT)


def reference_packed(hidden, weight, teacher, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and cross-entropy, document by document; the row's end is no end of a document."""
    q = (hidden @ weight.T).log_softmax(-1)
    p = (teacher.hidden_ND.double() @ teacher.head.weight_VD.double().T).log_softmax(-1)
    kl, ce, num_kl, num_ce = 0.0, 0.0, 0, 0
    for n, positions in enumerate(rows.positions_NT.tolist()):
        starts = [*(t for t, place in enumerate(positions) if place == 0), len(positions)]
        for start, end in itertools.pairwise(starts):
            for t in range(start, end if end == len(positions) else end - 1):
                kl, num_kl = kl + (p[n, t].exp() * (p[n, t] - q[n, t])).sum(), num_kl + 1
            for t in range(start, end - 1):
                ce, num_ce = ce - q[n, t, rows.ids_NT[n, t + 1]], num_ce + 1
    assert (num_kl, num_ce) == (20, 16)
    return kl / num_kl, ce / num_ce


def packed_problem() -> tuple[torch.Tensor, torch.Tensor, Teacher, TokenRows]:
    generator = torch.Generator().manual_seed(5)
    hidden, other = (torch.randn(4, 6, 8, generator=generator) for _ in range(2))
    weight, weight_t = (torch.randn(19, 8, generator=generator) for _ in range(2))
    return hidden, weight, Teacher(other, Head(weight_t)), packed_rows()


def test_ends_of_documents_are_left_out():
    hidden, weight, teacher, rows = packed_problem()
    assert TokenCounts.of(rows) == TokenCounts(20, 16)
    leaf = hidden.clone().requires_grad_()
    weights = LossWeights(kl=1.0, ce=0.5)
    loss, terms = head_distillation_loss(leaf, Head(weight), rows, weights, teacher=teacher)
    loss.backward()
    double = hidden.double().requires_grad_()
    kl, ce = reference_packed(double, weight.double(), teacher, rows)
    (kl + 0.5 * ce).backward()
    assert distance(terms["kl"], kl.detach()) < RELATIVE
    assert distance(terms["ce"], ce.detach()) < RELATIVE
    assert distance(leaf.grad, double.grad) < RELATIVE
    assert torch.count_nonzero(leaf.grad[1, 1]) == 0  # the end of a document inside its row
    assert leaf.grad[1, 5].abs().max() > 0  # the end of a row


def test_micro_batches_average_to_the_loss_of_the_whole_batch():
    """Rows of unequal numbers of documents: the parts' own means put the gradient off."""
    hidden, weight, teacher, rows = packed_problem()
    weights, whole = LossWeights(kl=1.0, ce=1.0), TokenCounts.of(rows)

    def gradient(counts, parts):
        leaf = hidden.clone().requires_grad_()
        for part in parts:
            taught = replace(teacher, hidden_ND=teacher.hidden_ND[part])
            loss, _ = head_distillation_loss(
                leaf[part], Head(weight), rows[part], weights, counts, taught
            )
            (loss / len(parts)).backward()
        return leaf.grad.double()

    halves = [slice(0, 2), slice(2, 4)]
    expected = gradient(None, [slice(None)])
    assert distance(gradient(whole.shared_by(2), halves), expected) < RELATIVE
    assert distance(gradient(None, halves), expected) > 0.05


def test_square_head_joins_and_can_stand_alone(monkeypatch):
    hidden, weight, teacher, rows = packed_problem()
    count = CountingProducts(monkeypatch)
    states = [torch.randn(4, 6, 8, requires_grad=True) for _ in range(2)]
    taught = [torch.randn(4, 6, 8) for _ in range(2)]
    alone, terms = head_distillation_loss(
        hidden, Head(weight), rows, LossWeights(kl=0.0, square_head=2.0), states=states,
        teacher_states=taught,
    )  # fmt: skip
    assert terms.keys() == {"square_head"}
    assert count.taken() == {}, "neither head is computed"
    assert alone.item() == pytest.approx(2 * terms["square_head"].item())
    both, terms = head_distillation_loss(
        hidden, Head(weight), rows, LossWeights(square_head=2.0), None, teacher, states, taught
    )
    assert both.item() == pytest.approx(alone.item() + terms["kl"].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        (LossWeights(), {"teacher": None}, "need a teacher"),
        (LossWeights(ce=1.0), {"targets": None}, "needs the next tokens"),
        (LossWeights(), {"counts": TokenCounts(0, 5)}, "no token counts for the KL"),
        (LossWeights(ce=1.0), {"counts": TokenCounts(5, 0)}, "no token counts for the cross"),
        (
            LossWeights(),
            {"teacher": Teacher(torch.zeros(37, 2), Head(torch.zeros(210, 2)))},
            "share the vocabulary",
        ),
    ],
)
def test_what_is_missing_is_said(weights, changes, message):
    problem = make_problem()
    arguments = {
        "counts": problem.counts, "teacher": problem.teacher, "targets": problem.targets,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        head_loss(problem.hidden, Head(problem.weight), weights, **(arguments | changes))


def test_schedule():
    start = LossWeights(kl=1.0, square_head=2.0, temperature=4.0)
    schedule = LossSchedule.parse(start, ["square_head_weight:0@0.1", "temperature:1@1"])
    assert schedule.at(0.0) == start
    assert schedule.at(0.05) == LossWeights(kl=1.0, square_head=1.0, temperature=3.85)
    assert schedule.at(0.1).square_head == schedule.at(0.7).square_head == 0.0
    assert schedule.at(1.0) == LossWeights(kl=1.0, square_head=0.0, temperature=1.0)
    assert (schedule.peak("square_head"), schedule.peak("ce")) == (2.0, 0.0)
    assert LossSchedule(start).at(0.3) == start


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["kl_weight:0@0.5"], "nothing to train on"),
        (["kl_weight:0@0.5", "ce_weight:1@1"], None),
        (["temperature:0@1"], "temperature=0"),
        (["kl_weight=0"], "is not NAME:END@SHARE"),
        (["kl_weight:0@0"], "share of the run over 0"),
        (["kl_weight:0@1.5"], "share of the run over 0"),
        (["kl_weight:nan@0.5"], "is not NAME:END@SHARE"),
        (["rate:0@0.5"], "names 'rate'"),
        (["temperature:2@0.5", "temperature:1@1"], "given twice"),
    ],
)
def test_schedules_are_checked(texts, message):
    if message is None:
        assert LossSchedule.parse(LossWeights(), texts).at(0.5).ce == 0.5
        return
    with pytest.raises(InputError, match=message):
        LossSchedule.parse(LossWeights(), texts)
