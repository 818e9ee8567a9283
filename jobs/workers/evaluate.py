"""On every worker: a share of the held-out rows, scored with every model, and what these write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluster.runtime.worker import WorkerContext
from conf.schema import Config
from jobs.corpus.rows import load_rows
from sparsify.data.rows import TokenRows
from sparsify.evaluation.perplexity import EvalSums, evaluate_rows
from sparsify.evaluation.writing import OPENING_TOKENS, Manner, write_text
from sparsify.models.load import check_sequence_length, load_model, load_pair


def score_share(context: WorkerContext, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """One task: score every model on each `shares`-th held-out row; the first also writes.

    The dense model is loaded once, the others come and go one after another beside it.

    Returns:
        For each of the payload's folders `sums`, an `EvalSums` as plain values, and `writing`:
        prompt, text and how it was written, or None.
    """
    torch.set_num_threads(context.num_threads)
    config, folders = payload["config"], payload["folders"]
    dense, tokenizer = load_pair(payload["dense"], config.model.dtype, context.device)
    check_sequence_length(dense.config, config.data.sequence_length)
    num_rows = config.evaluate.num_tokens // config.data.sequence_length
    rows, warning = load_rows(config.data, "heldout", tokenizer, num_rows, config.run.seed)
    is_first = payload["share"] == 0
    if warning and is_first:  # once for all shares
        context.warn(warning)
    rows = rows[payload["share"] :: payload["shares"]]
    parts = []
    for folder in folders:
        sums, writing = EvalSums(), None
        if len(rows):
            is_dense = folder == payload["dense"]
            model = dense if is_dense else load_model(folder, config.model.dtype, context.device)
            sums = evaluate_rows(model, rows, config.evaluate.batch_size, dense)
            if is_first and config.evaluate.num_new_tokens:
                writing = _writing(model, tokenizer, config, rows)
            del model  # before the next one takes its memory
        parts.append({"sums": asdict(sums), "writing": writing})
        context.progress(len(parts), len(folders))
    return parts


def _writing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, rows: TokenRows
) -> dict[str, Any] | None:
    """What the model writes after evaluate.prompt, or after the beginning of the first row."""
    settings = config.evaluate
    if settings.prompt is None:
        ids = rows.ids_NT[0, :OPENING_TOKENS].tolist()
        prompt = str(tokenizer.decode(ids, skip_special_tokens=True))
    else:
        ids, prompt = tokenizer(settings.prompt)["input_ids"], settings.prompt
    manner = Manner(settings.num_new_tokens, settings.temperature, config.run.seed)
    text = write_text(model, tokenizer, ids, manner)
    return None if text is None else {"prompt": prompt, "text": text, **asdict(manner)}


def total(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The score of a model from those of its shares, added in their order, and what it wrote."""
    sums = EvalSums()
    for part in parts:
        sums = sums + EvalSums(**part["sums"])
    return {
        "perplexity": sums.perplexity,
        "kl": sums.kl,
        "top1_agreement": sums.top1_agreement,
        "num_tokens": sums.num_tokens,
        "writing": parts[0]["writing"],
    }
