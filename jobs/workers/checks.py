"""What the driver asks of a run's models and text before anything is started, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conf.options.data import DataConfig
from jobs.corpus.sources import source_fingerprint
from jobs.planning.preflight import check_pruning, check_recovery
from jobs.runs.models import Models
from jobs.training.inputs import check_cache
from sparsify.calibration.layers import prunable_linears
from sparsify.models.load import (
    check_checkpoint,
    check_sequence_length,
    check_vocabulary,
    load_tokenizer,
)
from sparsify.pattern import Pattern, check_divides

__all__ = ["check_cache", "check_inputs", "check_pattern", "check_pruning", "check_recovery"]


def check_inputs(data: DataConfig, models: Models) -> None:
    """Require whole checkpoints, room for the rows, a tokenizer that fits, and text to read.

    Raises:
        InputError: something the user can put right.
    """
    dense = models.dense
    for folder in (dense, *models.made.get("prune", {}).values()):
        check_checkpoint(folder)
    tokenizer = load_tokenizer(dense)
    model = _shapes_of(dense)
    check_sequence_length(model.config, data.sequence_length)
    check_vocabulary(model, tokenizer, str(dense))
    source_fingerprint(data, "calibration")


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
