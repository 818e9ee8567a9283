"""What a model writes: a prompt that it continues, for people to read beside its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sparsify.models.calls import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPENING_TOKENS = 16
"""of a text, where its beginning is the prompt"""


@dataclass(frozen=True)
class Manner:
    """How tokens are chosen."""

    num_tokens: int
    """at most; fewer where a model ends its text, or has no positions left"""
    temperature: float = 0.0
    """of the distribution that is sampled; 0: always the likeliest token"""
    seed: int = 0
    """of the sampling"""


@torch.inference_mode()
def write_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int],
    manner: Manner,
) -> str | None:  # fmt: skip
    """The text that `model` writes after the prompt; None where nothing can follow it.

    The same model, prompt and manner give the same text on one device. What a model's own
    generation_config.json says of sampling does not count: all models are asked alike.

    Args:
        model: a causal LM; put into evaluation mode and left in the mode it had.
        tokenizer: of the model.
        prompt_ids: at least one token.
        manner: how to write.

    Cost: one forward pass for the prompt, and one for each further token.
    """
    room = num_positions(model.config) - len(prompt_ids)
    num_tokens = min(manner.num_tokens, room)
    if num_tokens < 1 or not prompt_ids:
        return None
    ids_1T = torch.tensor([prompt_ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if manner.temperature > 0:
        sampling = {"do_sample": True, "temperature": manner.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=num_tokens, use_cache=True, pad_token_id=_padding(model, tokenizer),
        **sampling,
    )  # fmt: skip
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(manner.seed)
        generate: Any = model.generate  # transformers types it as a tensor
        written = generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=config)
    # The words that follow depend on those before in some tokenizers (a leading space).
    prompt = str(tokenizer.decode(prompt_ids, skip_special_tokens=True))
    whole = str(tokenizer.decode(written[0], skip_special_tokens=True))
    return whole.removeprefix(prompt)


def num_positions(config: Any) -> int:
    """Tokens that a model of this configuration can see; very many where it does not say."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else 2**31


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A token for what comes after an end; generate only warns where it has none."""
    own: Any = model.generation_config
    ends = getattr(own, "eos_token_id", None)
    for token in (getattr(own, "pad_token_id", None), tokenizer.pad_token_id, ends):
        if token is not None:
            return token[0] if isinstance(token, list) else int(token)
    return None
