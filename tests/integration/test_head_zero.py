"""The loss inside the student's forward under ZeRO, beside plain training from full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparsify.data.rows import TokenRows
from sparsify.distillation import TokenCounts
from sparsify.distillation.head_loss import Teacher
from sparsify.distillation.student import DistillStudent
from sparsify.models.lm_head import find_head
from sparsify.models.varlen import VARLEN
from sparsify.models.varlen_check import choose_attention
from sparsify.params import LossWeights
from tests.families import in_two_documents, tiny, token_rows
from tests.integration.recoveries import run

CASES = [(0, False), (2, False), (3, False), (3, True)]
NUM_STEPS, ROWS, MICRO = 3, 16, 4
# Adam divides by the size of a gradient, whatever it is: with its usual 1e-8 the rounding of
# gradients near zero becomes whole steps and hides smaller mistakes.
ADAM_EPS = 0.01
WEIGHTS = LossWeights(kl=1.0, ce=0.5, square_head=0.1, temperature=2.0)


def batch(step: int) -> TokenRows:
    return in_two_documents(token_rows(ROWS, 20, seed=step))


def micro_batches(states: torch.Tensor) -> list[torch.Tensor]:
    """The rows of every micro-batch of both ranks."""
    return [part for rank in (0, 1) for part in states[rank::2].split(MICRO)]


def pair(tied: bool) -> tuple[Any, Any]:
    """Student and teacher; Gemma 2 caps its logits and ties its embedding, Llama does neither."""
    family = "Gemma2" if tied else "Llama"
    return tiny(family, 2, seed=0).train(), tiny(family, 2, seed=1).requires_grad_(False)


def plain_training(tied: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights by autograd through all logits, one process, the whole batch."""
    student, teacher = pair(tied)
    groups = [[p for p in student.parameters() if (p.ndim >= 2) == is_matrix]
              for is_matrix in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=ADAM_EPS,
    )  # fmt: skip
    losses = []
    for step in range(NUM_STEPS):
        rows = batch(step)
        inputs = {
            "input_ids": rows.ids_NT, "position_ids": rows.positions_NT, "use_cache": False,
            "output_hidden_states": True,
        }  # fmt: skip
        taught, out = teacher(**inputs), student(**inputs)
        log_q, log_p = (F.log_softmax(o.logits / 2.0, -1) for o in (out, taught))
        kl_NT = 4.0 * (log_p.exp() * (log_p - log_q)).sum(-1)
        targets = rows.ids_NT.roll(-1, 1).masked_fill(~rows.has_next_NT, -100)
        ce = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        states = zip(out.hidden_states[1:], taught.hidden_states[1:], strict=True)
        # A ratio of means: what micro-batches of 4 rows give is the mean of their ratios.
        square_head = sum(
            (a - b).square().mean() / (b.square().mean() + 2**-7) * MICRO / ROWS
            for pair_of in states
            for a, b in zip(*(micro_batches(s) for s in pair_of), strict=True)
        )
        loss = kl_NT[rows.is_taught_NT].mean() + 0.5 * ce + 0.1 * square_head
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in student.named_parameters()}


def teach(teacher: Any, rows: TokenRows) -> dict[str, Any]:
    head = find_head(teacher)
    with torch.no_grad():
        out = head.base(
            input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False,
            output_hidden_states=True,
        )  # fmt: skip
    return {
        "teacher": Teacher(out.last_hidden_state, head.plain()),
        "teacher_states": out.hidden_states,
    }


def train(rank: int, stage: int, tied: bool) -> tuple[list[float], dict[str, torch.Tensor] | None]:
    from conf.options.distill import DistillConfig
    from jobs.training import engine as _engine

    model, teacher = pair(tied)
    for one in (model, teacher):
        choose_attention(one, "auto", True, False, lambda said: None)
    assert (model.config._attn_implementation == VARLEN) == (not tied), "Gemma 2 is refused"
    student = DistillStudent(model, chunk_tokens=32)
    settings = DistillConfig(
        zero_stage=stage, batch_size=ROWS, micro_batch_size=MICRO, weight_decay=0.1,
        learning_rate=1e-3,
    )  # fmt: skip
    engine = _engine.build_engine(student, settings, 2, uses_gpu=False)
    assert dict(engine.module.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for group in engine.optimizer.param_groups:
        group["eps"] = ADAM_EPS
    losses = []
    for step in range(NUM_STEPS):
        rows = batch(step)
        counts = TokenCounts.of(rows).shared_by(ROWS // MICRO)
        total = torch.zeros(())
        for part in rows[rank::2].split(MICRO):
            loss, metrics = engine(
                rows=part, weights=WEIGHTS, counts=counts, **teach(teacher, part)
            )
            assert {"kl", "ce", "square_head", "agreement"} <= metrics.keys()
            if stage == 3:
                assert student.loss_head.weight.numel() == 0, "released after the forward"
            engine.backward(loss)
            engine.step()
            total += loss.detach() * MICRO / ROWS
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    return losses, _engine.gathered_state_dict(engine)


def train_all(rank: int, out: Path) -> None:
    from jobs.training import engine as _engine

    written = _engine.deepspeed_config

    def split_everything(*args: Any) -> dict[str, Any]:
        config = written(*args)
        # Otherwise every parameter of a tiny model stays whole on every rank, or until it is used
        # again in the backward pass.
        for name in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters"):
            config["zero_optimization"][f"stage3_{name}"] = 0
        return config

    _engine.deepspeed_config = split_everything
    for stage, tied in CASES:
        losses, state = train(rank, stage, tied)
        if state is not None:
            torch.save({"losses": losses, "state": state}, out / f"{stage}-{tied}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(2, train_all, folder)
    return folder


@pytest.mark.parametrize(("stage", "tied"), CASES)
def test_zero_trains_as_plain_autograd_does(trained: Path, stage: int, tied: bool) -> None:
    losses, weights = plain_training(tied)
    found = torch.load(trained / f"{stage}-{tied}")
    assert losses[-1] != losses[0]
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    begun = dict(pair(tied)[0].named_parameters())
    for name, weight in weights.items():
        moved = (weight - begun[name]).abs().max().item()
        error = (found["state"][name] - weight).abs().max().item()
        # Measured 7.5e-9; the steps move each tensor by 2e-5 or more.
        assert error < 1e-7 < 1e-5 < moved, name
