"""On every worker: a share of the held-out rows, scored with one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from cluster.runtime.worker import WorkerContext
from jobs.corpus.rows import load_rows
from sparsify.evaluation.perplexity import EvalSums, evaluate_rows
from sparsify.models.load import check_sequence_length, load_model, load_pair


def score_share(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any]:
    """One task: score one model on every `shares`-th held-out row."""
    torch.set_num_threads(context.num_threads)
    config = payload["config"]
    dense, tokenizer = load_pair(payload["dense"], config.model.dtype, context.device)
    check_sequence_length(dense.config, config.data.sequence_length)
    num_rows = config.evaluate.num_tokens // config.data.sequence_length
    rows, warning = load_rows(config.data, "heldout", tokenizer, num_rows, config.run.seed)
    if warning and payload["says"]:  # once for all shares of all models
        context.warn(warning)
    rows = rows[payload["share"] :: payload["shares"]]
    if len(rows) == 0:
        return asdict(EvalSums())
    model = load_model(payload["folder"], config.model.dtype, context.device)
    return asdict(evaluate_rows(model, rows, config.evaluate.batch_size, dense))


def total(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The score of a model from those of its shares, added in their order."""
    sums = EvalSums()
    for part in parts:
        sums = sums + EvalSums(**part)
    return {
        "perplexity": sums.perplexity,
        "kl": sums.kl,
        "top1_agreement": sums.top1_agreement,
        "num_tokens": sums.num_tokens,
    }
