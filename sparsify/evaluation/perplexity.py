"""How good a model is on held-out rows: perplexity, and agreement with the dense model.

Token t + 1 is predicted from the tokens up to t of the same document in the same row. The first
token of a document is not scored: nothing before it says what it will be. So a row of T tokens
scores T - 1 predictions, less one for each further document in it. Log-probabilities are taken in
float32, sums over tokens in float64; sums of separate shares of the rows add up to the sums of all
rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sparsify.data.rows import CHUNK_TOKENS, TokenRows, chunks
from sparsify.errors import InputError, NonFiniteError
from sparsify.models.calls import evaluating, run_model
from sparsify.models.isolation import check_isolation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EvalSums:
    """Sums over scored tokens; `+` merges the shares of several workers."""

    nll_sum: float = 0.0
    """negative log-likelihood of the true next tokens, nats"""
    num_tokens: int = 0
    """predictions scored"""
    kl_sum: float | None = None
    """KL(dense || model) over the vocabulary, nats; None without a dense model"""
    num_agree: int | None = None
    """predictions whose most likely token is the dense model's; None without a dense model"""

    def __add__(self, other: EvalSums) -> EvalSums:
        if self.num_tokens == 0:
            return other
        if other.num_tokens == 0:
            return self
        kl_sum, num_agree = None, None
        if self.kl_sum is not None and other.kl_sum is not None:
            kl_sum = self.kl_sum + other.kl_sum
        if self.num_agree is not None and other.num_agree is not None:
            num_agree = self.num_agree + other.num_agree
        if (self.kl_sum is None) != (other.kl_sum is None):
            raise ValueError("cannot add sums with a dense model to sums without one")
        return EvalSums(
            self.nll_sum + other.nll_sum,
            self.num_tokens + other.num_tokens,
            kl_sum,
            num_agree,
        )

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; infinite beyond the range of a float."""
        mean = self.nll_sum / self.num_tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def kl(self) -> float | None:
        """Mean KL(dense || model) per token in nats, if there was a dense model."""
        return None if self.kl_sum is None else self.kl_sum / self.num_tokens

    @property
    def top1_agreement(self) -> float | None:
        """Share of tokens whose most likely prediction is the dense model's, if there was one."""
        return None if self.num_agree is None else self.num_agree / self.num_tokens


@torch.inference_mode()
def evaluate_rows(
    model: PreTrainedModel,
    rows: TokenRows,
    batch_size: int,
    dense: PreTrainedModel | None = None,
) -> EvalSums:
    """Score `model` on packed rows.

    Args:
        model: a causal LM; put into evaluation mode and left in the mode it had.
        rows: N rows of T >= 2 tokens; documents in one row do not see each other.
        batch_size: rows per forward pass.
        dense: model to compare with, on the same device and of the same vocabulary; or None.

    Returns:
        The sums; see `EvalSums`.

    Raises:
        InputError: no prediction to score, the two models have different vocabularies, or a model
            cannot keep the documents of a row apart.
        NonFiniteError: NaN or infinity in the logits; names the first row.

    Cost: one forward pass per model, one in all where `dense` is `model`; beyond the logits of one
    batch, at most 1024 x vocabulary float32 values a few times over.
    """
    if not rows.has_next_NT.any():
        raise InputError(
            f"evaluation rows of shape {tuple(rows.ids_NT.shape)}: need at least one document of "
            "two tokens in a row; give more held-out text or a shorter data.sequence_length"
        )
    models = [model] if dense is None else [model, dense]
    if rows.is_joined:
        for m in models:
            check_isolation(m)
    sums = EvalSums()
    with evaluating(*models):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size].to(model.device)
            logits = [run_model(model, batch).logits]
            if dense is not None:  # the dense model itself has nothing to add
                logits.append(logits[0] if dense is model else run_model(dense, batch).logits)
            sums = sums + _score_batch(logits, batch, start)
    return sums


def _score_batch(logits: list[torch.Tensor], batch: TokenRows, first_row: int) -> EvalSums:
    """Sums of one batch; `logits` is [model] or [model, dense], each (B, T, V)."""
    widths = [x.shape[-1] for x in logits]
    if len(set(widths)) > 1:
        raise InputError(
            f"evaluate: the model has a vocabulary of {widths[0]} tokens and the dense model "
            f"{widths[1]}; compare with the model that it was pruned from"
        )
    sums = EvalSums()
    length = batch.ids_NT.shape[1]
    has_next_NT = batch.has_next_NT
    for row in range(len(batch)):
        for chunk in chunks(length - 1, CHUNK_TOKENS):
            parts = [x[row, chunk].float() for x in logits]
            for part, who in zip(parts, ("model", "dense model"), strict=False):
                if not part.isfinite().all():
                    raise NonFiniteError(
                        f"evaluate: logits of the {who} are not finite in row {first_row + row}; "
                        "its weights or activations overflow in this dtype"
                    )
            is_scored = has_next_NT[row, chunk]
            targets = batch.ids_NT[row, 1:][chunk][is_scored]
            sums = sums + _score_tokens([part[is_scored] for part in parts], targets)
    return sums


def _score_tokens(logits: list[torch.Tensor], targets: torch.Tensor) -> EvalSums:
    """Sums of one chunk: float32 logits (N, V) of [model] or [model, dense], targets (N,)."""
    log_q = logits[0].log_softmax(dim=-1)
    nll = -log_q.gather(1, targets[:, None]).double().sum().item()
    if len(logits) == 1:
        return EvalSums(nll, len(targets))
    log_p = logits[1].log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum().item()
    agree = int((logits[0].argmax(dim=-1) == logits[1].argmax(dim=-1)).sum())
    return EvalSums(nll, len(targets), kl, agree)


def log_gap_recovered(dense_ppl: float, oneshot_ppl: float, ppl: float) -> float | None:
    """Share of the one-shot log-perplexity gap that a recovered model has closed.

    1 is the dense model, 0 the one-shot pruned one; it may be negative or exceed 1.

    Returns:
        (log oneshot - log ppl) / (log oneshot - log dense); None when one-shot pruning left no
        gap to close or a perplexity is infinite.
    """
    values = (dense_ppl, oneshot_ppl, ppl)
    if not all(math.isfinite(v) and v > 0 for v in values) or oneshot_ppl <= dense_ppl:
        return None
    return math.log(oneshot_ppl / ppl) / math.log(oneshot_ppl / dense_ppl)
