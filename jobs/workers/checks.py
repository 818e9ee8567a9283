"""What the driver asks of a run's models before anything is started, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conf.schema import Config
from jobs.corpus.tokens import check_tokens
from jobs.runs.models import Models
from sparsify.calibration.layers import prunable_linears
from sparsify.models.blocks import stored_of
from sparsify.models.load import (
    check_checkpoint,
    check_sequence_length,
    check_vocabulary,
    read_tokenizer,
)
from sparsify.pattern import Pattern, check_divides
from sparsify.pruning.coverage import coverage


def check_inputs(config: Config, models: Models) -> list[str]:
    """Require whole checkpoints, room for the rows, and a tokenizer that fits the text.

    Args:
        config: of the run.
        models: what it starts from.

    Returns:
        What of the models is left out or is not as they say, in one line each.

    Raises:
        InputError: something the user can put right.
    """
    data, dense = config.data, models.dense
    for folder in (dense, *models.made.get("prune", {}).values()):
        check_checkpoint(folder)
    tokenizer, remark = read_tokenizer(dense)
    model = _shapes_of(dense)
    check_sequence_length(model.config, data.sequence_length)
    check_vocabulary(model, tokenizer, str(dense))
    num_rows = model.get_input_embeddings().weight.shape[0]
    said = check_tokens(data, "distill" in config.stages, tokenizer, dense, num_rows)
    left = coverage(model, config.prune.skip).remark() if "prune" in config.stages else None
    remarks = {dense: said + [text for text in (remark, left) if text is not None]}
    for folder in (dense, *models.made.get("prune", {}).values()):
        remarks.setdefault(folder, []).extend(stored_of(folder, config.model.dtype).remarks())
    return [f"model {folder.name}: {text}" for folder, texts in remarks.items() for text in texts]


def check_pattern(dense: Path, pattern: str, skip: Sequence[str]) -> None:
    """Require that every layer to prune has whole groups of the pattern.

    Raises:
        InputError: a layer's inputs are no multiple of the group's length.
    """
    parsed = Pattern.parse(pattern)
    for _, name, module in prunable_linears(_shapes_of(dense), skip):
        check_divides(name, module.in_features, parsed)


def _shapes_of(folder: Path) -> Any:
    """A model without its weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
