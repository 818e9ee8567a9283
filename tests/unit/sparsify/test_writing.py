"""What a model writes after a prompt: the likeliest tokens by hand, and sampling by its seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsify.evaluation.writing import Manner, num_positions, write_text

PROMPT = [5, 9, 2, 17]


def likeliest(model, ids: list[int], num_tokens: int) -> list[int]:
    """Without a cache: a whole forward for every token."""
    for _ in range(num_tokens):
        with torch.inference_mode():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == model.generation_config.eos_token_id:
            break
    return ids


def test_the_likeliest_tokens(tiny_model, tiny_tokenizer) -> None:
    written = write_text(tiny_model, tiny_tokenizer, PROMPT, Manner(12))
    whole = tiny_tokenizer.decode(likeliest(tiny_model, PROMPT, 12), skip_special_tokens=True)
    assert written
    assert tiny_tokenizer.decode(PROMPT, skip_special_tokens=True) + written == whole


def test_sampling_is_the_seeds_and_leaves_the_generator_alone(tiny_model, tiny_tokenizer) -> None:
    # What a model asks for itself does not count: of one token there is nothing to sample.
    tiny_model.generation_config.top_k = 1
    manner = Manner(12, temperature=2.0, seed=1)
    state = torch.get_rng_state()
    texts = [write_text(tiny_model, tiny_tokenizer, PROMPT, manner) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert texts[0] == texts[1]
    other = write_text(tiny_model, tiny_tokenizer, PROMPT, replace(manner, seed=2))
    assert other != texts[0]
    assert texts[0] != write_text(tiny_model, tiny_tokenizer, PROMPT, Manner(12))


def test_the_mode_of_the_model_stays(tiny_model, tiny_tokenizer) -> None:
    tiny_model.train()
    write_text(tiny_model, tiny_tokenizer, PROMPT, Manner(2))
    assert tiny_model.training


@pytest.mark.parametrize(("left", "asked", "expected"), [(0, 4, 0), (2, 4, 2), (2, 0, 0)])
def test_no_more_than_there_are_positions(
    tiny_model, tiny_tokenizer, left: int, asked: int, expected: int
) -> None:
    tiny_model.generation_config.eos_token_id = None
    limit = num_positions(tiny_model.config)
    prompt = torch.randint(1, 40, (limit - left,), generator=torch.Generator().manual_seed(0))
    written = write_text(tiny_model, tiny_tokenizer, prompt.tolist(), Manner(asked))
    if not expected:
        assert written is None
        return
    tokens = likeliest(tiny_model, prompt.tolist(), expected)[-expected:]
    assert written == tiny_tokenizer.decode(tokens, skip_special_tokens=True)
