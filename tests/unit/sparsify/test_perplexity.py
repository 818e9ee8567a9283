"""Scores against a slow float64 loop, and what happens at the edges."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from sparsify.data.rows import TokenRows
from sparsify.errors import InputError, NonFiniteError
from sparsify.evaluation.perplexity import EvalSums, evaluate_rows, log_gap_recovered


@pytest.fixture
def other_model(tiny_model):
    """A neighbour of `tiny_model`, so that agreement is neither none nor all."""
    other = copy.deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(3)
    for weight in other.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return other


def slow_sums(model, dense, rows):
    """Prediction by prediction, softmax in float64, every document of a row run by itself."""
    nll = kl = 0.0
    agree = count = 0
    for row, positions in zip(rows.ids_NT, rows.positions_NT, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(row)]
        for start, end in itertools.pairwise(starts):
            document = row[start:end]
            with torch.no_grad():
                z = model(input_ids=document[None]).logits[0].double()
                z_dense = dense(input_ids=document[None]).logits[0].double()
            for t in range(len(document) - 1):
                q = torch.exp(z[t]) / torch.exp(z[t]).sum()
                p = torch.exp(z_dense[t]) / torch.exp(z_dense[t]).sum()
                nll -= math.log(q[document[t + 1]])
                kl += (p * torch.log(p / q)).sum().item()
                agree += int(q.argmax() == p.argmax())
                count += 1
    return nll, kl, agree, count


@pytest.mark.parametrize("kind", ["tiny_rows", "packed_rows"])
def test_matches_a_slow_float64_loop(tiny_model, other_model, kind, request):
    rows = request.getfixturevalue(kind)
    nll, kl, agree, count = slow_sums(tiny_model, other_model, rows)
    sums = evaluate_rows(tiny_model, rows, batch_size=5, dense=other_model)
    assert count == sums.num_tokens == int((rows.positions_NT != 0).sum())
    assert 0 < sums.num_agree < count
    assert sums.num_agree == agree
    # float32 log-probabilities: measured 3e-9 (likelihood) and 1e-7 (divergence).
    assert sums.nll_sum == pytest.approx(nll, rel=1e-6)
    assert sums.kl_sum == pytest.approx(kl, rel=1e-5)
    assert sums.perplexity == pytest.approx(math.exp(nll / count), rel=1e-6)
    assert sums.top1_agreement == agree / count


def test_chunks_of_a_long_row_add_up(tiny_model, other_model, packed_rows, monkeypatch):
    whole = evaluate_rows(tiny_model, packed_rows, batch_size=3, dense=other_model)
    monkeypatch.setattr("sparsify.evaluation.perplexity.CHUNK_TOKENS", 7)
    parts = evaluate_rows(tiny_model, packed_rows, batch_size=3, dense=other_model)
    assert parts.num_tokens == whole.num_tokens
    assert parts.nll_sum == pytest.approx(whole.nll_sum, rel=1e-7)
    assert parts.num_agree == whole.num_agree


def test_shares_of_workers_merge(tiny_model, other_model, tiny_rows):
    whole = evaluate_rows(tiny_model, tiny_rows, batch_size=4, dense=other_model)
    shares = [evaluate_rows(tiny_model, tiny_rows[r::3], 4, dense=other_model) for r in range(3)]
    merged = sum(shares, EvalSums())
    assert merged.num_tokens == whole.num_tokens
    assert merged.num_agree == whole.num_agree
    assert merged.nll_sum == pytest.approx(whole.nll_sum, rel=1e-9)
    assert merged.kl_sum == pytest.approx(whole.kl_sum, rel=1e-5)
    with pytest.raises(ValueError, match="without one"):
        _ = shares[0] + evaluate_rows(tiny_model, tiny_rows, 4)


def test_without_a_dense_model(tiny_model, tiny_rows):
    sums = evaluate_rows(tiny_model, tiny_rows, batch_size=4)
    assert sums.kl is None
    assert sums.top1_agreement is None
    assert sums.perplexity > 1


def test_a_model_agrees_with_itself(tiny_model, tiny_rows):
    sums = evaluate_rows(tiny_model, tiny_rows, batch_size=4, dense=tiny_model)
    assert sums.kl == 0.0
    assert sums.top1_agreement == 1.0


def test_uniform_logits_give_the_vocabulary_size(tiny_model, tiny_rows):
    tiny_model.lm_head.weight.data.zero_()
    vocabulary = tiny_model.config.vocab_size
    assert evaluate_rows(tiny_model, tiny_rows, 4).perplexity == pytest.approx(vocabulary, rel=1e-6)


def test_mode_is_restored(tiny_model, tiny_rows):
    tiny_model.train()
    evaluate_rows(tiny_model, tiny_rows, 5)
    assert tiny_model.training


def test_non_finite_logits_name_the_first_row(tiny_model, other_model, tiny_rows):
    # Only a token that no other row has makes trouble.
    ids_NT = tiny_rows.ids_NT.clamp(max=300)
    ids_NT[7, 9] = 305
    rows = TokenRows.whole(ids_NT)
    tiny_model.model.embed_tokens.weight.data[305] = float("nan")
    with pytest.raises(NonFiniteError, match=r"logits of the model .* row 7;"):
        evaluate_rows(tiny_model, rows, 4)
    with pytest.raises(NonFiniteError, match=r"logits of the dense model .* row 7;"):
        evaluate_rows(other_model, rows, 4, dense=tiny_model)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_nothing_to_score_is_refused(tiny_model, shape):
    rows = TokenRows.whole(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(InputError, match="at least one document of two tokens"):
        evaluate_rows(tiny_model, rows, 4)


def test_documents_of_one_token_score_nothing(tiny_model, tiny_rows):
    rows = TokenRows(tiny_rows.ids_NT, torch.zeros_like(tiny_rows.positions_NT))
    with pytest.raises(InputError, match="at least one document of two tokens"):
        evaluate_rows(tiny_model, rows, 4)
    positions_NT = torch.zeros_like(tiny_rows.positions_NT)
    positions_NT[3, 5:7] = torch.arange(2)
    assert evaluate_rows(tiny_model, TokenRows(tiny_rows.ids_NT, positions_NT), 4).num_tokens == 1


def test_vocabularies_must_agree(tiny_model, other_model, tiny_rows):
    other_model.resize_token_embeddings(tiny_model.config.vocab_size + 8)
    with pytest.raises(InputError, match="vocabulary"):
        evaluate_rows(tiny_model, tiny_rows, 4, dense=other_model)


def test_perplexity_beyond_the_range_of_a_float():
    assert EvalSums(nll_sum=1e6, num_tokens=10).perplexity == math.inf


def test_log_gap_recovered():
    assert log_gap_recovered(5.0, 20.0, 5.0) == 1.0
    assert log_gap_recovered(5.0, 20.0, 20.0) == 0.0
    assert log_gap_recovered(5.0, 20.0, 10.0) == pytest.approx(0.5)
    assert log_gap_recovered(5.0, 20.0, 40.0) == pytest.approx(-0.5)
    assert log_gap_recovered(5.0, 5.0, 5.0) is None
    assert log_gap_recovered(5.0, 4.0, 5.0) is None
    assert log_gap_recovered(5.0, math.inf, 5.0) is None
