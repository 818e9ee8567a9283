"""Heads of model families, found and proven, and the student that returns its own loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from sparsify.distillation.head_loss import Teacher
from sparsify.distillation.student import DistillStudent, LossHead
from sparsify.errors import InputError
from sparsify.models import lm_head
from sparsify.models.lm_head import HeadTransform, alike_tokens, check_head, find_head
from sparsify.params import LossWeights
from tests.families import FAMILIES, in_two_documents, tiny, token_rows

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def scaled(family: str, **settings: float) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_families_are_found(family, dtype):
    model = tiny(family).to(dtype).train()
    found = check_head(model)
    assert found.linear is model.get_output_embeddings()
    assert model.training, "left as it was"
    assert found.transform.soft_cap == (30.0 if family == "Gemma2" else None)


@pytest.mark.parametrize(
    ("model", "transform"),
    [
        (lambda: scaled("Granite", logits_scaling=8.0), HeadTransform(scale=1 / 8)),
        (lambda: scaled("Cohere", logit_scale=0.25), HeadTransform(scale=0.25)),
    ],
)
def test_scales_of_families_are_found(model, transform):
    assert check_head(model()).transform == transform


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.01,
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: logits + 1,
    ],
)
def test_a_head_that_does_more_is_refused(change):
    """Also a cap far above the logits of a model with random weights."""

    class Unknown(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    with pytest.raises(InputError, match=r"Unknown: its logits are not .* stages without distill"):
        check_head(Unknown(tiny("Llama").config).eval())


def test_models_without_a_linear_head_are_refused():
    model = tiny("Llama")
    model.lm_head = nn.Identity()
    with pytest.raises(InputError, match="LlamaForCausalLM: its head is Identity"):
        find_head(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_student_trains_as_with_full_logits(family):
    """Loss and every gradient, tied or not, capped or not, against autograd through the logits."""
    teacher = tiny(family, 2, seed=5)
    rows = in_two_documents(token_rows(2, 12))
    inputs = {"input_ids": rows.ids_NT, "position_ids": rows.positions_NT, "use_cache": False}

    plain = tiny(family, 2)
    out = plain(**inputs, output_hidden_states=True)
    with torch.no_grad():
        taught = teacher(**inputs, output_hidden_states=True)
        head = check_head(teacher)
        states = head.base(**inputs).last_hidden_state
    log_q, log_p = (o.logits.double().log_softmax(-1) for o in (out, taught))
    kl_NT = (log_p.exp() * (log_p - log_q)).sum(-1)
    targets = rows.ids_NT.roll(-1, 1).masked_fill(~rows.has_next_NT, -100)
    ce = F.cross_entropy(out.logits.double().flatten(0, 1), targets.flatten())
    pairs = zip(out.hidden_states[1:], taught.hidden_states[1:], strict=True)
    square_head = sum((a - b).square().mean() / (b.square().mean() + 2**-7) for a, b in pairs)
    expected = kl_NT[rows.is_taught_NT].mean() + 0.5 * ce + 0.1 * square_head
    expected.backward()

    student = DistillStudent(tiny(family, 2), chunk_tokens=5)
    loss, metrics = student(
        rows, LossWeights(kl=1.0, ce=0.5, square_head=0.1),
        teacher=Teacher(states, head.plain()), teacher_states=taught.hidden_states,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics.keys() == {"kl", "reverse_kl", "agreement", "ce", "square_head"}
    assert metrics["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        got = student.model.get_parameter(name).grad
        # Through the blocks both sides are float32. Gradients that are zero in theory (the bias of
        # keys) are left with 1e-10.
        assert (got - parameter.grad).norm() <= 3e-5 * parameter.grad.norm() + 1e-9, name


def test_student_is_the_model_to_whoever_asks_for_names():
    model = tiny("Gemma2")
    student = DistillStudent(model)
    assert dict(student.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert student.state_dict().keys() == model.state_dict().keys()
    assert [id(p) for p in student.parameters()] == [id(p) for p in model.parameters()]
    assert len(list(student.buffers())) == len(list(model.buffers()))
    state = {name: value + 1 for name, value in student.state_dict().items()}
    student.load_state_dict(state)
    assert torch.equal(student.loss_head.weight, state["lm_head.weight"])
    student.to(torch.bfloat16)
    assert student.loss_head.weight is model.lm_head.weight
    modules = [module for module in student.modules() if not isinstance(module, LossHead)]
    assert len(modules) == len(list(model.modules())) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_with_the_row_of_another(dtype, monkeypatch):
    """Beside distances in float64; the vocabulary in parts that do not divide it."""
    monkeypatch.setattr(lm_head, "_ALIKE_ROWS", 7)
    monkeypatch.setattr(lm_head, "_ALIKE_TOKENS", 4)
    weight_VD = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    weight_VD[31] = weight_VD[3]
    weight_VD[12] = 1.005 * weight_VD[20]
    weight_VD[25] = 1.03 * weight_VD[26]
    weight_VD = weight_VD.to(dtype)
    distances = torch.cdist(weight_VD.double(), weight_VD.double()).fill_diagonal_(torch.inf)
    is_alike = distances.min(1).values <= 0.01 * weight_VD.double().norm(dim=1)
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:30]
    assert sorted(is_alike.nonzero().flatten().tolist()) == [3, 12, 20, 31]
    assert alike_tokens(weight_VD, ids).tolist() == [i for i in ids.tolist() if is_alike[i]]
    assert len(alike_tokens(weight_VD, torch.tensor([25, 26, 0]))) == 0
    assert len(alike_tokens(weight_VD, torch.tensor([], dtype=torch.int64))) == 0
    assert alike_tokens(weight_VD[:36], torch.tensor([35])).tolist() == []  # alone in its part
