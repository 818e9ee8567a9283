"""Fisher token weights against autograd by hand in float64, and what makes them weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from sparsify.calibration.fisher import CEILING, FLOOR, fisher_token_weights
from sparsify.data.rows import TokenRows
from sparsify.errors import CalibrationError, InputError, NonFiniteError

NUM_BLOCKS, WIDTH, VOCABULARY = 3, 16, 24


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=32,
        num_hidden_layers=NUM_BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def packed_rows(num_rows: int = 5, num_tokens: int = 12) -> TokenRows:
    """Two documents per row, the second beginning at another place in every row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (num_rows, num_tokens), generator=generator)
    positions = torch.arange(num_tokens).repeat(num_rows, 1)
    for row in range(num_rows):
        positions[row, row + 3 :] -= row + 3
    return TokenRows(ids, positions)


def oracle(model: nn.Module, rows: TokenRows, seed: int) -> Tensor:
    """Document by document: logits from a block's output on by hand, labels from the same draws."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(rows.ids_NT.shape, generator=generator, dtype=torch.float64)
    raw = torch.zeros(NUM_BLOCKS, *rows.ids_NT.shape, dtype=torch.float64)
    for row in range(len(rows)):
        starts = (rows.positions_NT[row] == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], rows.ids_NT.shape[1]], strict=True):
            ids = rows.ids_NT[row : row + 1, start:stop]
            output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
            loss = torch.zeros((), dtype=torch.float64)
            for token in range(stop - start - 1):
                log_p = output.logits[0, token].log_softmax(-1)
                passed = (log_p.exp().cumsum(-1) > draws[row, start + token]).nonzero()
                loss = loss - log_p[int(passed[0])]
            # The last of hidden_states is behind the final norm, so the block's own is hooked.
            hidden = [*output.hidden_states[1:-1], model.last_block_output]
            grads = torch.autograd.grad(loss, hidden) if stop - start > 1 else []
            for block, grad in enumerate(grads):
                raw[block, row, start:stop] = grad[0].square().sum(-1)
    weights = raw / raw.mean((1, 2), keepdim=True)
    weights = weights.clamp(max=CEILING)
    weights = weights / weights.mean((1, 2), keepdim=True)
    return (1 - FLOOR) * weights + FLOOR


def test_equals_autograd_by_hand_document_by_document() -> None:
    model, rows = tiny(), packed_rows()
    model.model.layers[-1].register_forward_hook(
        lambda module, args, output: setattr(
            model, "last_block_output", output[0] if isinstance(output, tuple) else output
        )
    )
    expected = oracle(model, rows, seed=3)
    found = fisher_token_weights(model, rows, 2, seed=3)
    assert found.dtype == torch.float32 and found.shape == (NUM_BLOCKS, 5, 12)
    assert expected.std() > 0.5, "the weights are all alike and prove nothing"
    # float64 until the last cast to float32; weights up to 10, measured 1.1e-7.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)


def test_mean_of_many_draws_is_the_curvature_of_the_kl() -> None:
    """Of the last block, whose output one prediction alone depends on: trace of J^T F J."""
    model = tiny()
    rows = packed_rows(num_rows=2, num_tokens=6)
    raw = torch.zeros(2, 6, dtype=torch.float64)
    for seed in range(200):
        raw += fisher_token_weights(model, rows, 2, seed=seed)[-1]
    hidden: list[Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda module, args, output: hidden.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    model(input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False)
    handle.remove()
    head = nn.Sequential(model.model.norm, model.lm_head)
    trace = torch.zeros(2, 6, dtype=torch.float64)
    for row, token in rows.has_next_NT.nonzero().tolist():
        state = hidden[0][row, token].detach()
        jacobian = torch.autograd.functional.jacobian(head, state)
        p = head(state).softmax(-1)
        trace[row, token] = (jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian).trace()
    expected = (1 - FLOOR) * trace / trace.mean() + FLOOR
    assert torch.corrcoef(torch.stack([raw.flatten(), expected.flatten()]))[0, 1] > 0.97


class TestLaws:
    def test_mean_is_one_and_no_token_is_lost(self) -> None:
        weights = fisher_token_weights(tiny(), packed_rows(), 2)
        # float32 mean of 60 numbers.
        torch.testing.assert_close(weights.mean((1, 2)), torch.ones(NUM_BLOCKS), atol=1e-6, rtol=0)
        assert weights.min() >= FLOOR * (1 - 1e-6)

    def test_batch_size_does_not_matter_and_the_seed_does(self) -> None:
        model, rows = tiny(), packed_rows()
        whole = fisher_token_weights(model, rows, 5)
        # Other shapes of products may round otherwise; measured 0.
        torch.testing.assert_close(fisher_token_weights(model, rows, 1), whole, rtol=0, atol=1e-5)
        assert torch.equal(fisher_token_weights(model, rows, 5), whole)
        assert not torch.allclose(fisher_token_weights(model, rows, 5, seed=1), whole, atol=0.1)

    def test_documents_of_a_row_do_not_meet(self) -> None:
        model, rows = tiny(), packed_rows(num_rows=1)
        changed = TokenRows(rows.ids_NT.clone(), rows.positions_NT)
        changed.ids_NT[0, :3] = (changed.ids_NT[0, :3] + 7) % VOCABULARY
        one, other = (fisher_token_weights(model, r, 1)[:, 0, 3:] - FLOOR for r in (rows, changed))
        # Only the common mean differs, so weights keep their ratios (none is cut here).
        torch.testing.assert_close(
            one / one.sum(1, True), other / other.sum(1, True), rtol=0, atol=1e-5
        )

    def test_the_end_of_a_document_matters_least_to_the_last_block(self) -> None:
        rows = packed_rows()
        weights = fisher_token_weights(tiny(), rows, 5)
        assert (weights[-1][~rows.has_next_NT] == torch.tensor(FLOOR)).all()

    def test_extremes_are_cut(self) -> None:
        model, rows = tiny(), packed_rows(num_rows=40)
        with torch.no_grad():
            model.model.embed_tokens.weight[5] *= 1e-4  # a tiny state: a huge gradient
        for layer in model.model.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        weights = fisher_token_weights(model, rows, 8)
        cut = weights[0].max()
        mean_before_mixing = (CEILING * (1 - FLOOR)) / (cut - FLOOR)
        assert (weights[0] == cut).sum() > 1, "nothing was cut"
        assert 0 < mean_before_mixing < 1

    def test_model_is_left_as_it_was(self) -> None:
        model = tiny().train()
        model.lm_head.weight.requires_grad_(False)
        seen = []
        fisher_token_weights(model, packed_rows(), 2, lambda *done: seen.append(done))
        assert seen == [(2, 5), (4, 5), (5, 5)]
        assert model.training and not model.lm_head.weight.requires_grad
        assert model.model.embed_tokens.weight.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())


class TestRefusals:
    def test_no_rows_and_no_batch(self) -> None:
        with pytest.raises(CalibrationError, match="no calibration row"):
            fisher_token_weights(tiny(), packed_rows()[:0], 2)
        with pytest.raises(InputError, match="batch_size=0"):
            fisher_token_weights(tiny(), packed_rows(), 0)

    def test_documents_of_one_token_give_no_gradient(self) -> None:
        rows = TokenRows(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))
        with pytest.raises(CalibrationError, match=r"no gradient reaches model\.layers\.0"):
            fisher_token_weights(tiny(), rows, 2)

    def test_what_is_not_finite_is_named(self) -> None:
        model = tiny()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="logits of LlamaForCausalLM"):
            fisher_token_weights(model, packed_rows(), 2)
        model = tiny()
        model.model.layers[1].register_full_backward_hook(
            lambda module, into, out: tuple(grad * float("inf") for grad in into)
        )
        with pytest.raises(NonFiniteError, match=r"gradients at model\.layers\.0"):
            fisher_token_weights(model, packed_rows(), 2)
